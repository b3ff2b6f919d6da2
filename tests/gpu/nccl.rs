//! NCCL between the ranks: a world of one on any version, several ranks on one GPU where this NCCL and its environment allow it.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use libtest_mimic::Trial;
use moeyard::backend::{Backend, DType};
use moeyard::comm::nccl::{Library, Nccl, Options};

use crate::collectives::{CHECKS, World, on_ranks};
use crate::pair::{gpu, tensor};
use crate::trial;

const ALONE: Options = Options {
    connect_timeout: Duration::from_secs(60),
    timeout: Duration::from_secs(60),
    shared_gpu: false,
    loopback: true,
};
const TOGETHER: Options = Options { shared_gpu: true, loopback: false, ..ALONE };

pub fn trials() -> Vec<Trial> {
    let library = library();
    let shared = library.as_ref().map_err(String::clone).and_then(|library| {
        if !library.shares_gpus() {
            Err(format!("{} puts one rank on a GPU", library.describe()))
        } else if std::env::var_os("NCCL_MULTI_RANK_GPU_ENABLE").is_none_or(|value| value != "1") {
            Err("NCCL_MULTI_RANK_GPU_ENABLE=1 is not set".to_owned())
        } else {
            Ok(())
        }
    });
    match &library {
        Ok(library) => eprintln!("with {}", library.describe()),
        Err(why) => eprintln!("nccl:: ignored: {why}"),
    }
    if let (Ok(_), Err(why)) = (&library, &shared) {
        eprintln!("nccl::shared:: ignored: {why}");
    }
    let alone = CHECKS.iter().map(|&(name, check)| {
        trial(&format!("nccl::alone::{name}"), move || check(&|size| world(size, ALONE), &[1]))
    });
    let together = CHECKS.iter().map(|&(name, check)| {
        trial(&format!("nccl::shared::{name}"), move || check(&|size| world(size, TOGETHER), &[2, 4]))
    });
    let hang = trial("nccl::shared::an_exchange_that_hangs_ends_with_its_reason", an_exchange_that_hangs);
    let many = trial("nccl::shared::rounds_of_large_rows", rounds_of_large_rows);
    alone
        .map(|trial| trial.with_ignored_flag(library.is_err()))
        .chain(together.chain([many, hang]).map(|trial| trial.with_ignored_flag(shared.is_err())))
        .collect()
}

fn library() -> Result<Arc<Library>, String> {
    let given = std::env::var_os("MOEYARD_NCCL_SO").map(PathBuf::from);
    Library::load(given.as_deref()).map(Arc::new)
}

fn world(size: usize, options: Options) -> World {
    let backends: Vec<Arc<dyn Backend>> = (0..size).map(|_| gpu()).collect();
    let ranks = Nccl::world(library().unwrap(), &backends, options).unwrap();
    backends.into_iter().zip(ranks.into_iter().map(|rank| Box::new(rank) as _)).collect()
}

/// Rank 1 never comes: what rank 0 waits for on the GPU is cut short, and its download says so.
fn an_exchange_that_hangs() {
    let options = Options { timeout: Duration::from_secs(3), shared_gpu: false, ..TOGETHER };
    let outcomes = on_ranks(world(2, options), |backend, rank| {
        let mut x = tensor(backend, DType::F32, 8, 8, &[1.0; 64]);
        // The first sum allocates what the second works in: while a kernel hangs, allocating may hang too.
        rank.all_reduce_sum(x.view_mut()).unwrap();
        backend.download(x.view(), &mut [0; 256]).unwrap();
        rank.barrier().unwrap();
        if rank.rank() == 1 {
            return rank.barrier().unwrap_err().to_string();
        }
        let summed = rank.all_reduce_sum(x.view_mut());
        summed.and_then(|()| backend.download(x.view(), &mut [0; 256])).unwrap_err().to_string()
    });
    for outcome in outcomes {
        assert!(outcome.contains("has not ended within 3 s"), "{outcome}");
    }
}

/// Exchanges of megabytes without a download between them.
fn rounds_of_large_rows() {
    let (rows, cols, rounds, size) = (1024, 2048, 10, 2);
    for found in on_ranks(world(size, TOGETHER), |backend, rank| {
        let counts = vec![rows / size; size];
        let mut x = tensor(backend, DType::F32, rows, cols, &vec![rank.rank() as f32; rows * cols]);
        let one = tensor(backend, DType::F32, rows, cols, &vec![1.0; rows * cols]);
        let mut y = backend.alloc(DType::F32, rows, cols).unwrap();
        for _ in 0..rounds {
            rank.all_to_all_rows(x.view(), &counts, y.view_mut(), &counts).unwrap();
            backend.add_scaled(one.view(), 1.0, y.view_mut()).unwrap();
            rank.all_reduce_sum(y.view_mut()).unwrap();
            backend.scale(0.5, y.view_mut()).unwrap();
            backend.copy_rows(y.view(), x.view_mut()).unwrap();
        }
        crate::pair::values(backend, x.view())
    }) {
        let expected = 0.5 + rounds as f32;
        assert!(found.iter().all(|&x| x == expected), "{:?}, expected {expected}", &found[..4]);
    }
}
