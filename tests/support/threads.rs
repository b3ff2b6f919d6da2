//! Ranks, each on a thread of its own.

/// Gives every rank to `body`; what came of each, in rank order.
pub fn on_threads<R: Send, T: Send>(
    ranks: impl IntoIterator<Item = R>,
    body: impl Fn(R) -> T + Sync,
) -> Vec<T> {
    std::thread::scope(|scope| {
        let body = &body;
        let threads: Vec<_> = ranks.into_iter().map(|rank| scope.spawn(move || body(rank))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}
