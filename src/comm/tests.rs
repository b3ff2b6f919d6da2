//! The checks of every transport, over host memory.

use std::sync::Arc;
use std::time::Duration;

use super::local::Local;
use super::nccl::{self, Nccl};
use crate::backend::Backend;
use crate::backend::reference::ReferenceBackend;

#[path = "../../tests/support/collectives.rs"]
mod collectives;

use collectives::{CHECKS, World};

/// Nothing here takes it.
const PATIENCE: Duration = Duration::from_secs(60);

fn backends(size: usize) -> Vec<Arc<dyn Backend>> {
    (0..size).map(|_| Arc::new(ReferenceBackend) as Arc<dyn Backend>).collect()
}

fn world<C: super::Communicator + 'static>(backends: Vec<Arc<dyn Backend>>, ranks: Vec<C>) -> World {
    backends.into_iter().zip(ranks.into_iter().map(|rank| Box::new(rank) as _)).collect()
}

#[test]
fn local() {
    for (name, check) in CHECKS {
        eprintln!("{name}");
        check(&|size| world(backends(size), Local::world(backends(size))), &[1, 2, 3, 4, 5]);
    }
}

#[test]
fn nccl() {
    for (shared_gpu, loopback) in [(false, false), (true, false), (false, true)] {
        let options = nccl::Options { connect_timeout: PATIENCE, timeout: PATIENCE, shared_gpu, loopback };
        for (name, check) in CHECKS {
            eprintln!("{name}, {options:?}");
            check(
                &|size| {
                    let library = nccl::mock::library::<{ nccl::mock::NOTHING }>().unwrap();
                    let ranks = Nccl::world(library, &backends(size), options).unwrap();
                    world(backends(size), ranks)
                },
                &[1, 2, 3, 5],
            );
        }
    }
}
