//! What happens when NCCL fails, and that nothing hangs.

use std::sync::Arc;
use std::time::Duration;

use super::mock::{self, communicators, library};
use super::*;
use crate::backend::DType;
use crate::backend::reference::ReferenceBackend;
use crate::support::threads::on_threads;

/// Long enough for any honest exchange of these tests, on a machine as busy as it may be.
const PATIENCE: Duration = Duration::from_secs(60);
/// What is awaited in vain need not be awaited for long.
const IN_VAIN: Duration = Duration::from_millis(200);

fn connect(
    library: Arc<Library>,
    size: usize,
    connect_timeout: Duration,
    timeout: Duration,
) -> Result<Vec<Nccl>> {
    let backends: Vec<_> = (0..size).map(|_| Arc::new(ReferenceBackend) as Arc<dyn Backend>).collect();
    Nccl::world(library, &backends, Options { connect_timeout, timeout, shared_gpu: false, loopback: false })
}

/// Every rank sums until that fails; what each got.
fn sum_until_failure(world: Vec<Nccl>) -> Vec<String> {
    on_threads(world, |mut rank| {
        let mut x = ReferenceBackend.alloc(DType::F32, 2, 3).unwrap();
        loop {
            if let Err(error) = rank.all_reduce_sum(x.view_mut()) {
                let again = rank.barrier().unwrap_err();
                assert!(matches!(again, Error::Peer { .. }), "{again}");
                return error.to_string();
            }
        }
    })
}

#[test]
fn a_refused_rank_is_the_one_told() {
    let error =
        connect(library::<{ mock::REFUSED }>().unwrap(), 3, PATIENCE, PATIENCE).err().unwrap().to_string();
    assert_eq!(error, "cpu: NCCL: connecting: invalid usage (mock)");
    assert_eq!(communicators(mock::REFUSED).0, 0);
}

#[test]
fn a_rank_that_never_connects_is_not_awaited_for_ever() {
    let error = connect(library::<{ mock::NEVER_CONNECTS }>().unwrap(), 3, IN_VAIN, PATIENCE)
        .err()
        .unwrap()
        .to_string();
    assert_eq!(error, "cpu: NCCL: connecting has not ended within 0.2 s");
    assert_eq!(communicators(mock::NEVER_CONNECTS).0, 0);
}

#[test]
fn a_failing_call_ends_all_ranks_with_its_reason() {
    let world = connect(library::<{ mock::CALL_FAILS }>().unwrap(), 3, PATIENCE, PATIENCE).unwrap();
    let errors = sum_until_failure(world);
    let why = "NCCL: a sum over ranks: unhandled system error (mock)";
    assert_eq!(errors[1], format!("cpu: {why}"));
    assert_eq!(errors[0], format!("rank 0: rank 1: {why}"));
    assert_eq!(errors[2], format!("rank 2: rank 1: {why}"));
    assert_eq!(communicators(mock::CALL_FAILS), (0, 3));
}

#[test]
fn an_error_that_comes_later_ends_all_ranks() {
    let world = connect(library::<{ mock::FAILS_LATER }>().unwrap(), 3, PATIENCE, PATIENCE).unwrap();
    for error in sum_until_failure(world) {
        assert!(error.contains("remote process exited or there was a network error (mock)"), "{error}");
    }
    assert_eq!(communicators(mock::FAILS_LATER), (0, 3));
}

#[test]
fn an_exchange_that_hangs_is_aborted() {
    let world = connect(library::<{ mock::HANGS }>().unwrap(), 3, PATIENCE, IN_VAIN).unwrap();
    for error in sum_until_failure(world) {
        assert!(error.contains("NCCL: a sum over ranks has not ended within 0.2 s"), "{error}");
    }
    assert_eq!(communicators(mock::HANGS), (0, 3));
}

#[test]
fn a_communicator_that_does_not_end_is_aborted() {
    let world = connect(library::<{ mock::NEVER_FINALIZES }>().unwrap(), 2, PATIENCE, PATIENCE).unwrap();
    assert_eq!(communicators(mock::NEVER_FINALIZES), (2, 0));
    drop(world);
    assert_eq!(communicators(mock::NEVER_FINALIZES), (0, 1));
}

#[test]
fn an_old_library_is_refused() {
    let why = library::<{ mock::OLD }>().err().unwrap();
    assert_eq!(why, "expected version 2.18.0 or newer, found 2.10.3");
}
