//! A bar for what takes seconds, on a terminal only: logs and pipes stay clean.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// A bar over `steps` steps that clears itself; hidden where stderr is not a terminal.
pub fn count(what: &'static str, steps: u64) -> ProgressBar {
    bar(what, steps, "{msg} [{bar:40}] {pos}/{len} {elapsed}")
}

/// A bar over `bytes` bytes that clears itself; hidden where stderr is not a terminal.
pub fn bytes(what: &'static str, bytes: u64) -> ProgressBar {
    bar(what, bytes, "{msg} [{bar:40}] {bytes}/{total_bytes} {bytes_per_sec}")
}

fn bar(what: &'static str, length: u64, template: &str) -> ProgressBar {
    let style = ProgressStyle::with_template(template).expect("a valid template").progress_chars("=> ");
    // indicatif draws to a terminal only; 10 redraws a second cost nothing.
    let bar = ProgressBar::with_draw_target(Some(length), ProgressDrawTarget::stderr_with_hz(10));
    bar.set_style(style);
    bar.set_message(what);
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}
