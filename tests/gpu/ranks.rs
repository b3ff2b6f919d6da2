//! Several ranks on one GPU: `comm::local` by streams, events and device copies.

use std::sync::Arc;

use libtest_mimic::Trial;
use moeyard::backend::{Backend, DType};
use moeyard::comm::Communicator;
use moeyard::comm::local::Local;

use crate::collectives::CHECKS;
use crate::pair::{gpu, tensor, values};
use crate::support::threads::on_threads;
use crate::trial;

pub fn trials() -> Vec<Trial> {
    let checks = CHECKS.iter().map(|&(name, check)| {
        trial(&format!("ranks::{name}"), move || {
            check(
                &|size| {
                    let backends: Vec<Arc<dyn Backend>> = (0..size).map(|_| gpu()).collect();
                    let ranks = Local::world(backends.clone()).into_iter().map(|rank| Box::new(rank) as _);
                    backends.into_iter().zip(ranks).collect()
                },
                &[1, 2, 4],
            )
        })
    });
    let streams = trial("ranks::collectives_order_the_streams", collectives_order_the_streams);
    checks.chain([streams]).collect()
}

/// Rounds of large exchanges without a single download between them: a missing wait would read rows too early or too late.
fn collectives_order_the_streams() {
    let (rows, cols, rounds) = (512, 1024, 20);
    for size in [2, 3, 4] {
        let backends: Vec<Arc<dyn Backend>> = (0..size).map(|_| gpu()).collect();
        let world = Local::world(backends.clone());
        on_threads(world.into_iter().zip(&backends), |(mut rank, backend)| {
            let own = rank.rank();
            let mut x = tensor(backend.as_ref(), DType::F32, rows, cols, &vec![own as f32; rows * cols]);
            let mut gathered = backend.alloc(DType::F32, rows * size, cols).unwrap();
            let mut returned = backend.alloc(DType::F32, rows * size, cols).unwrap();
            for _ in 0..rounds {
                // x becomes the sum over ranks of (x + 1): the same on all.
                let one = tensor(backend.as_ref(), DType::F32, rows, cols, &vec![1.0; rows * cols]);
                backend.add_scaled(one.view(), 1.0, x.view_mut()).unwrap();
                rank.all_reduce_sum(x.view_mut()).unwrap();
                backend.scale(1.0 / size as f32, x.view_mut()).unwrap();
                rank.all_gather_rows(x.view(), &vec![rows; size], gathered.view_mut()).unwrap();
                let counts = vec![rows; size];
                rank.all_to_all_rows(gathered.view(), &counts, returned.view_mut(), &counts).unwrap();
                backend.copy_rows(returned.view().rows_range(rows..2 * rows), x.view_mut()).unwrap();
            }
            let mean = (0..size).sum::<usize>() as f32 / size as f32;
            let expected = mean + rounds as f32;
            for (i, found) in values(backend.as_ref(), x.view()).into_iter().enumerate() {
                assert!(
                    (found - expected).abs() < 1e-3,
                    "rank {own} of {size}, element {i}: {found}, {expected}"
                );
            }
        });
    }
}
