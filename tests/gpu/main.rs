//! The CUDA backend against the reference, operation by operation, over many shapes. Where there is no GPU, or the build has no
//! CUDA, every test is listed as ignored and the reason is printed first.

mod attention;
#[path = "../support/collectives.rs"]
mod collectives;
mod dense;
mod faults;
mod moe;
#[path = "../support/moe_rank.rs"]
mod moe_rank;
mod nccl;
mod pair;
mod products;
mod quantized;
mod ranks;
mod sample;
mod steps;
#[path = "../support/mod.rs"]
mod support;
mod world;

use libtest_mimic::{Arguments, Trial};
use moeyard::backend::cuda;
use support::threads;

fn main() {
    let arguments = Arguments::from_args();
    let gpus = cuda::devices();
    match &gpus {
        Ok(gpus) => eprintln!("on {}", gpus[0].name),
        Err(why) => eprintln!("ignored: {why}"),
    }
    let groups = [
        dense::trials(),
        products::trials(),
        quantized::trials(),
        attention::trials(),
        moe::trials(),
        sample::trials(),
        ranks::trials(),
        steps::trials(),
        world::trials(),
        nccl::trials(),
        faults::trials(),
    ];
    let all = groups.into_iter().flatten();
    let trials = match gpus {
        Ok(_) => all.collect(),
        Err(_) => all.map(|trial| trial.with_ignored_flag(true)).collect(),
    };
    libtest_mimic::run(&arguments, trials).exit();
}

/// A test that fails by panicking, as those of the standard harness do.
fn trial(name: &str, body: impl Fn() + Send + 'static) -> Trial {
    Trial::test(name, move || {
        body();
        Ok(())
    })
}
