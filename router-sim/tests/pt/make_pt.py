"""Writes the .pt files beside it: what torch.save makes of SGLang's recorder output, without PyTorch.

The standard library's pickle writes protocol 2 as torch.save does; stand-ins for PyTorch's modules give the globals and
persistent ids their names. Numbers follow (layer, token) so that tests can predict them.
"""

import io
import pathlib
import pickle
import struct
import sys
import types
import zipfile

HERE = pathlib.Path(__file__).parent


def stand_in(module, **names):
    made = types.ModuleType(module)
    for name, value in names.items():
        value.__module__, value.__qualname__ = module, name
        setattr(made, name, value)
    sys.modules[module] = made


class IntStorage:
    pass


class LongStorage:
    pass


def _rebuild_tensor_v2(*arguments):
    raise NotImplementedError


stand_in("torch", IntStorage=IntStorage, LongStorage=LongStorage)
stand_in("torch._utils", _rebuild_tensor_v2=_rebuild_tensor_v2)


class Storage:
    def __init__(self, kind, values):
        self.kind, self.values = kind, values


class Tensor:
    def __init__(self, kind, shape, values):
        self.storage, self.shape = Storage(kind, values), shape

    def __reduce__(self):
        strides, due = [], 1
        for length in reversed(self.shape):
            strides.insert(0, due)
            due *= length
        return _rebuild_tensor_v2, (self.storage, 0, self.shape, tuple(strides), False, __import__("collections").OrderedDict())


class Pickler(pickle.Pickler):
    def __init__(self, file):
        super().__init__(file, protocol=2)
        self.storages = []

    def persistent_id(self, value):
        if not isinstance(value, Storage):
            return None
        self.storages.append(value)
        return "storage", value.kind, str(len(self.storages) - 1), "cpu", len(value.values)


def save(name, value):
    pickled = io.BytesIO()
    pickler = Pickler(pickled)
    pickler.dump(value)
    folder = name.removesuffix(".pt")
    with zipfile.ZipFile(HERE / name, "w", zipfile.ZIP_STORED) as archive:
        def put(path, data):
            archive.writestr(zipfile.ZipInfo(f"{folder}/{path}"), data)
        put("data.pkl", pickled.getvalue())
        put("byteorder", b"little")
        for key, storage in enumerate(pickler.storages):
            width = "i" if storage.kind is IntStorage else "q"
            put(f"data/{key}", struct.pack(f"<{len(storage.values)}{width}", *storage.values))
        put("version", b"3\n")


LAYERS, EXPERTS, SLOTS, TOKENS = 3, 4, 6, 5
# Layer 0 is dense. Slots 4 and 5 are second copies of experts 0 and 3.
MAP = Tensor(LongStorage, (LAYERS, SLOTS), [0, 1, 2, 3, 0, 3] * LAYERS)

save("stat.pt", {
    "rank": 0,
    "logical_count": Tensor(IntStorage, (2, LAYERS, EXPERTS), [
        (100 * step + 10 * layer + expert) * (layer > 0)
        for step in range(2) for layer in range(LAYERS) for expert in range(EXPERTS)
    ]),
    "average_utilization_rate_over_window": None,
})

# A tensor alone.
save("bare.pt", Tensor(LongStorage, (LAYERS, EXPERTS), [
    (10 * layer + expert) * (layer > 0) for layer in range(LAYERS) for expert in range(EXPERTS)
]))

save("per_pass.pt", {
    "records": [{
        "forward_pass_id": 7 + n,
        "rank": 0,
        "gatherer_key": "primary",
        "global_physical_count": Tensor(IntStorage, (LAYERS, SLOTS), [
            (10 * n + layer + slot) * (layer > 0) for layer in range(LAYERS) for slot in range(SLOTS)
        ]),
    } for n in range(2)],
    "last_physical_to_logical_map": MAP,
})


def per_token(n, mode, lengths):
    ids = []
    for layer in range(LAYERS):
        for token in range(TOKENS):
            real = layer > 0 and token < TOKENS - 1
            ids += ([(token + layer) % SLOTS, (token + layer + 1) % SLOTS] if real else [-1, -1]) + [-1] * 6
    return {
        "forward_pass_id": n,
        "rank": 0,
        "gatherer_key": "primary",
        "input_ids": list(range(TOKENS)),
        "positions": [0, 1, 2, 0, 1] if lengths else [30] * TOKENS,
        "extend_seq_lens": lengths,
        "forward_mode": mode,
        "topk_ids_of_layer": Tensor(IntStorage, (LAYERS, TOKENS, 8), ids),
        "misc_objects": [],
        "global_physical_count": Tensor(IntStorage, (LAYERS, SLOTS), [0] * (LAYERS * SLOTS)),
    }


save("per_token.pt", {
    "records": [per_token(0, 1, [3, 2]), per_token(1, 2, None)],
    "last_physical_to_logical_map": MAP,
})
