use super::*;
use crate::backend::reference::ReferenceBackend;

/// Runs `body` on every rank of a world of `size`, each in its own thread, and returns the results in rank order.
fn on_ranks<T: Send>(size: usize, body: impl Fn(&dyn Backend, &mut Local) -> T + Sync) -> Vec<T> {
    let backends: Vec<Arc<dyn Backend>> =
        (0..size).map(|_| Arc::new(ReferenceBackend) as Arc<dyn Backend>).collect();
    let world = Local::world(backends.clone());
    std::thread::scope(|scope| {
        let body = &body;
        let threads: Vec<_> = world
            .into_iter()
            .zip(&backends)
            .map(|(mut rank, backend)| scope.spawn(move || body(backend.as_ref(), &mut rank)))
            .collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    })
}

fn upload(backend: &dyn Backend, rows: usize, cols: usize, values: &[f32]) -> Tensor {
    let mut tensor = backend.alloc(DType::F32, rows.max(1), cols).unwrap();
    if rows > 0 {
        backend.upload(bytemuck::cast_slice(values), tensor.head_mut(rows)).unwrap();
    }
    tensor
}

fn download(backend: &dyn Backend, view: View<'_>) -> Vec<f32> {
    let mut host = vec![0f32; view.rows() * view.cols()];
    if !host.is_empty() {
        backend.download(view, bytemuck::cast_slice_mut(&mut host)).unwrap();
    }
    host
}

#[test]
fn sums_run_in_rank_order_and_agree_on_all_ranks() {
    // In this order the sum is 1; in any order that meets -1e8 before 1e8 + 1 has rounded, it is not.
    let terms = [1e8f32, 1.0, -1e8, 1.0];
    let expected = ((terms[0] + terms[1]) + terms[2]) + terms[3];
    for sums in on_ranks(4, |backend, rank| {
        let mut x = upload(backend, 1, 1, &[terms[rank.rank()]]);
        rank.all_reduce_sum(x.view_mut()).unwrap();
        download(backend, x.view())
    }) {
        assert_eq!(sums, [expected]);
    }
}

#[test]
fn reduce_scatter_then_all_gather_is_all_reduce() {
    for size in 1..=5 {
        let counts: Vec<usize> = (0..size).map(|r| [2, 0, 3, 1, 1][r]).collect();
        let rows: usize = counts.iter().sum();
        let results = on_ranks(size, |backend, rank| {
            let values: Vec<f32> = (0..rows * 3).map(|i| (i * (rank.rank() + 1)) as f32).collect();
            let mut all = upload(backend, rows, 3, &values);
            let mut own = backend.alloc(DType::F32, 4, 3).unwrap();
            let mine = counts[rank.rank()];
            rank.reduce_scatter_rows(all.head(rows), &counts, own.head_mut(mine)).unwrap();
            rank.all_gather_rows(own.head(mine), &counts, all.head_mut(rows)).unwrap();
            download(backend, all.head(rows))
        });
        let factor = (1..=size).sum::<usize>();
        let expected: Vec<f32> = (0..rows * 3).map(|i| (i * factor) as f32).collect();
        assert!(results.iter().all(|r| *r == expected), "world of {size}");
    }
}

#[test]
fn all_to_all_delivers_in_source_order_over_many_rounds() {
    for size in 1..=4 {
        on_ranks(size, |backend, rank| {
            let me = rank.rank();
            for round in 0..40 {
                // From s to d travel (s + 2 d + round) % 3 rows that hold (s, d, i).
                let amount = |s: usize, d: usize| (s + 2 * d + round) % 3;
                let row = |s: usize, d: usize, i: usize| [s as f32, d as f32, i as f32];
                let sent: Vec<usize> = (0..size).map(|d| amount(me, d)).collect();
                let received: Vec<usize> = (0..size).map(|s| amount(s, me)).collect();
                let values: Vec<f32> =
                    (0..size).flat_map(|d| (0..sent[d]).flat_map(move |i| row(me, d, i))).collect();
                let expected: Vec<f32> =
                    (0..size).flat_map(|s| (0..received[s]).flat_map(move |i| row(s, me, i))).collect();
                let (out, back) = (values.len() / 3, expected.len() / 3);
                let rows = upload(backend, out, 3, &values);
                let mut arrived = backend.alloc(DType::F32, back.max(1), 3).unwrap();
                rank.all_to_all_rows(rows.head(out), &sent, arrived.head_mut(back), &received).unwrap();
                assert_eq!(download(backend, arrived.head(back)), expected, "round {round}");

                let counts: Vec<u32> = sent.iter().map(|&n| n as u32).collect();
                let mut swapped = vec![9; size];
                rank.exchange_counts(&counts, &mut swapped).unwrap();
                assert!(swapped.iter().zip(&received).all(|(&a, &b)| a as usize == b));
            }
        });
    }
}

#[test]
fn pairs_exchange_rows_while_the_others_look_on() {
    for size in 1..=5 {
        on_ranks(size, |backend, rank| {
            let me = rank.rank();
            for round in 0..30 {
                // A rotation in which some do not take part, whole or with empty rows.
                let takes_part = |r: usize| !(r * 7 + round).is_multiple_of(3);
                let rows = round % 4;
                let (to, from) = ((me + round) % size, (me + size - round % size) % size);
                let own = upload(backend, rows, 2, &vec![(me * 100 + round) as f32; rows * 2]);
                let mut arrived = backend.alloc(DType::F32, rows.max(1), 2).unwrap();
                let sent = takes_part(me).then(|| (to, own.head(rows)));
                let received = takes_part(from).then(|| (from, arrived.head_mut(rows)));
                rank.send_receive_rows(sent, received).unwrap();
                let expected = if takes_part(from) { (from * 100 + round) as f32 } else { 0.0 };
                assert_eq!(download(backend, arrived.head(rows)), vec![expected; rows * 2]);
            }
        });
    }
}

#[test]
fn split_makes_groups_that_work_by_themselves() {
    let sums = on_ranks(5, |backend, rank| {
        let me = rank.rank();
        let mut group = rank.split(me % 2).unwrap();
        assert_eq!((group.rank(), group.size()), (me / 2, if me % 2 == 0 { 3 } else { 2 }));
        let mut x = upload(backend, 1, 1, &[me as f32]);
        group.all_reduce_sum(x.view_mut()).unwrap();
        download(backend, x.view())[0]
    });
    assert_eq!(sums, [6.0, 4.0, 6.0, 4.0, 6.0]);
}

#[test]
fn a_leaving_rank_releases_the_others() {
    let backends: Vec<Arc<dyn Backend>> =
        (0..3).map(|_| Arc::new(ReferenceBackend) as Arc<dyn Backend>).collect();
    let mut world = Local::world(backends);
    let gone = world.pop().unwrap();
    std::thread::scope(|scope| {
        let waiting: Vec<_> =
            world.iter_mut().map(|rank| scope.spawn(move || rank.barrier().unwrap_err())).collect();
        drop(gone);
        for error in waiting {
            assert!(error.join().unwrap().to_string().contains("rank 2"));
        }
    });
}
