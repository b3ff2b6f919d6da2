//! The checks of every transport, over host memory.

use std::sync::Arc;
use std::time::Duration;

use super::Communicator;
use super::local::Local;
use super::nccl::{self, Nccl};
use crate::backend::Backend;
use crate::backend::reference::ReferenceBackend;
use crate::support::collectives::{CHECKS, World};

/// Nothing here takes it.
const PATIENCE: Duration = Duration::from_secs(60);

fn backends(size: usize) -> Vec<Arc<dyn Backend>> {
    (0..size).map(|_| Arc::new(ReferenceBackend) as Arc<dyn Backend>).collect()
}

fn pair<C: Communicator + 'static>(backends: Vec<Arc<dyn Backend>>, ranks: Vec<C>) -> World {
    backends.into_iter().zip(ranks.into_iter().map(|rank| Box::new(rank) as _)).collect()
}

fn over_local(size: usize) -> World {
    pair(backends(size), Local::world(backends(size)))
}

fn over_nccl(size: usize, shared_gpu: bool, loopback: bool) -> World {
    let options = nccl::Options { connect_timeout: PATIENCE, timeout: PATIENCE, shared_gpu, loopback };
    let library = nccl::mock::library::<{ nccl::mock::NOTHING }>().unwrap();
    pair(backends(size), Nccl::world(library, &backends(size), options).unwrap())
}

/// A world of each kind, in host memory.
pub(crate) fn worlds(size: usize) -> [World; 2] {
    [over_local(size), over_nccl(size, false, false)]
}

#[test]
fn local() {
    for (name, check) in CHECKS {
        eprintln!("{name}");
        check(&over_local, &[1, 2, 3, 4, 5]);
    }
}

#[test]
fn nccl() {
    for (shared_gpu, loopback) in [(false, false), (true, false), (false, true)] {
        for (name, check) in CHECKS {
            eprintln!("{name}, shared GPU {shared_gpu}, loopback {loopback}");
            check(&|size| over_nccl(size, shared_gpu, loopback), &[1, 2, 3, 5]);
        }
    }
}
