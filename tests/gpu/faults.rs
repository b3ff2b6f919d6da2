//! What a GPU does that is full, that fails, or whose results no longer count.

use libtest_mimic::Trial;
use moeyard::Error;
use moeyard::backend::cuda::CudaBackend;
use moeyard::backend::{Backend, DType, DeviceId, Storage, Tensor};

use crate::pair::{gpu, tensor, values};
use crate::trial;

/// Those of `sticky::` leave the process without a GPU: each is run by itself.
pub fn trials() -> Vec<Trial> {
    vec![
        trial("faults::a_full_gpu_tells_what_was_wanted_and_is_free", a_full_gpu),
        trial("faults::a_poisoned_rank_gives_nothing_away", a_poisoned_rank),
        trial("sticky::an_illegal_access_stays_an_error", an_illegal_access),
    ]
}

fn a_full_gpu() {
    let gpu = gpu();
    let refusal = gpu.alloc(DType::F32, 1 << 20, 1 << 20).err().expect("4 TiB");
    assert!(matches!(refusal, Error::Memory { .. }), "{refusal}");
    let message = refusal.to_string();
    let expected = "not enough memory on cuda:0: 4398046511104 bytes more > ";
    assert!(message.starts_with(expected) && message.ends_with(" available"), "{message}");
    // Nothing else is lost.
    let whole = tensor(gpu.as_ref(), DType::F32, 2, 2, &[1.0, 2.0, 3.0, 4.0]);
    assert_eq!(values(gpu.as_ref(), whole.view()), [1.0, 2.0, 3.0, 4.0]);
}

fn a_poisoned_rank() {
    let (lost, witness, other) = (gpu(), gpu(), gpu());
    let make = |gpu: &dyn Backend| tensor(gpu, DType::F32, 1, 2, &[5.0, 6.0]);
    let [theirs, seen, ours] = [&lost, &witness, &other].map(|gpu| make(gpu.as_ref()));
    lost.poison("rank 3: an exchange has not ended", None);
    lost.poison("a later reason", None);
    witness.poison("rank 3: an exchange has not ended", Some(1));
    let refusal = lost.download(theirs.view(), &mut [0; 8]).unwrap_err();
    assert!(matches!(refusal, Error::Device { .. }), "{refusal}");
    assert_eq!(refusal.to_string(), "cuda:0: rank 3: an exchange has not ended");
    let refusal = witness.download(seen.view(), &mut [0; 8]).unwrap_err();
    assert!(matches!(refusal, Error::Peer { rank: 1, .. }), "{refusal}");
    assert_eq!(values(other.as_ref(), ours.view()), [5.0, 6.0]);
}

/// Memory that is nobody's.
struct Nowhere;

impl Storage for Nowhere {
    fn address(&self) -> usize {
        1 << 12
    }
    fn bytes(&self) -> usize {
        1 << 12
    }
    fn device(&self) -> DeviceId {
        DeviceId::Cuda(0)
    }
}

fn an_illegal_access() {
    let gpu = gpu();
    let mut out = tensor(gpu.as_ref(), DType::F32, 4, 4, &[0.0; 16]);
    let nowhere = Tensor::new(Box::new(Nowhere), DType::F32, 4, 4);
    let given = gpu.copy_rows(nowhere.view(), out.view_mut());
    let error = given.and_then(|()| gpu.download(out.view(), &mut [0; 64])).unwrap_err();
    assert!(error.to_string().contains("ILLEGAL_ADDRESS"), "{error}");
    // The whole process has lost the GPU, and nobody is told otherwise.
    for again in [gpu.download(out.view(), &mut [0; 64]), gpu.alloc(DType::F32, 1, 1).map(|_| ())] {
        let error = again.unwrap_err();
        assert!(matches!(error, Error::Device { .. }), "{error}");
    }
    assert!(CudaBackend::open(0).is_err());
}
