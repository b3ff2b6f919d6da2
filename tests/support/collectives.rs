//! What every [`Communicator`] does, whatever carries the rows: the body of tests over each transport.

use std::sync::Arc;

use half::bf16;
use moeyard::backend::{Backend, DType, Tensor, View};
use moeyard::comm::Communicator;

use super::threads::on_threads;

/// Connected ranks with their devices, in rank order.
pub type World = Vec<(Arc<dyn Backend>, Box<dyn Communicator>)>;

/// Makes worlds of a given size.
pub type Connect<'a> = &'a (dyn Fn(usize) -> World + Sync);

/// A check and its name; it makes worlds of these sizes, in ascending order.
pub type Check = (&'static str, fn(Connect<'_>, &[usize]));

/// All of them.
pub const CHECKS: &[Check] = &[
    ("sums_run_in_rank_order_and_agree", sums_run_in_rank_order_and_agree),
    ("reduce_scatter_then_all_gather_is_all_reduce", reduce_scatter_then_all_gather_is_all_reduce),
    ("all_to_all_delivers_in_source_order", all_to_all_delivers_in_source_order),
    ("parts_are_gathered_together", parts_are_gathered_together),
    ("rows_with_gaps_and_of_any_type_travel", rows_with_gaps_and_of_any_type_travel),
    ("pairs_exchange_rows_while_others_look_on", pairs_exchange_rows_while_others_look_on),
    ("split_makes_groups_that_work_by_themselves", split_makes_groups_that_work_by_themselves),
    ("a_leaving_rank_releases_the_others", a_leaving_rank_releases_the_others),
];

/// Runs `body` on every rank of a world, each in its own thread, and returns the results in rank order.
pub fn on_ranks<T: Send>(
    world: World,
    body: impl Fn(&dyn Backend, &mut dyn Communicator) -> T + Sync,
) -> Vec<T> {
    on_threads(world, |(backend, mut rank)| body(backend.as_ref(), rank.as_mut()))
}

/// A matrix with these elements and room for at least one row.
pub fn upload(backend: &dyn Backend, rows: usize, cols: usize, values: &[f32]) -> Tensor {
    let mut tensor = backend.alloc(DType::F32, rows.max(1), cols).unwrap();
    if rows > 0 {
        backend.upload(bytemuck::cast_slice(values), tensor.head_mut(rows)).unwrap();
    }
    tensor
}

/// The elements of a view.
pub fn download(backend: &dyn Backend, view: View<'_>) -> Vec<f32> {
    let mut host = vec![0f32; view.rows() * view.cols()];
    if !host.is_empty() {
        backend.download(view, bytemuck::cast_slice_mut(&mut host)).unwrap();
    }
    host
}

fn largest(sizes: &[usize]) -> usize {
    *sizes.last().expect("sizes")
}

/// Numbers whose sums depend on the order of the terms: those of rank r at element i.
fn term(r: usize, i: usize) -> f32 {
    let x = (i * 31 + r * 7919) % 1009;
    (x as f32 - 500.0) * [1e-6, 1.0, 1e5, 1e-3][(i + r) % 4]
}

fn ordered_sum(size: usize, i: usize) -> f32 {
    (1..size).fold(term(0, i), |sum, r| sum + term(r, i))
}

fn sums_run_in_rank_order_and_agree(connect: Connect<'_>, sizes: &[usize]) {
    // In this order the sum of four is 1; in any order that meets -1e8 before 1e8 + 1 has rounded, it is not.
    let few = |r: usize| [1e8f32, 1.0, -1e8, 1.0][r % 4];
    // Few bytes and many, rows that divide by the ranks and rows that do not.
    let shapes = [(1, 1), (3, 5), (7, 33), (401, 257)];
    let value = |shape, r, i| if shape == (1, 1) { few(r) } else { term(r, i) };
    for &size in sizes {
        let sums = on_ranks(connect(size), |backend, rank| {
            shapes.map(|shape @ (rows, cols)| {
                let own: Vec<f32> = (0..rows * cols).map(|i| value(shape, rank.rank(), i)).collect();
                let mut x = upload(backend, rows, cols, &own);
                rank.all_reduce_sum(x.view_mut()).unwrap();
                download(backend, x.view())
            })
        });
        for (me, sums) in sums.iter().enumerate() {
            for (&shape, found) in shapes.iter().zip(sums) {
                for (i, x) in found.iter().enumerate() {
                    let expected = (1..size).fold(value(shape, 0, i), |sum, r| sum + value(shape, r, i));
                    assert_eq!(
                        x.to_bits(),
                        expected.to_bits(),
                        "{size} ranks, {shape:?}, element {i} on rank {me}"
                    );
                }
            }
        }
    }
}

fn reduce_scatter_then_all_gather_is_all_reduce(connect: Connect<'_>, sizes: &[usize]) {
    for &size in sizes {
        let counts: Vec<usize> = (0..size).map(|r| [2, 0, 3, 1, 1][r % 5]).collect();
        let rows: usize = counts.iter().sum();
        let results = on_ranks(connect(size), |backend, rank| {
            let values: Vec<f32> = (0..rows * 3).map(|i| term(rank.rank(), i)).collect();
            let mut all = upload(backend, rows, 3, &values);
            let mut own = backend.alloc(DType::F32, 4, 3).unwrap();
            let mine = counts[rank.rank()];
            rank.reduce_scatter_rows(all.head(rows), &counts, own.head_mut(mine)).unwrap();
            rank.all_gather_rows(own.head(mine), &counts, all.head_mut(rows)).unwrap();
            download(backend, all.head(rows))
        });
        let expected: Vec<f32> = (0..rows * 3).map(|i| ordered_sum(size, i)).collect();
        assert!(results.iter().all(|r| *r == expected), "world of {size}");
    }
}

fn all_to_all_delivers_in_source_order(connect: Connect<'_>, sizes: &[usize]) {
    for &size in sizes {
        on_ranks(connect(size), |backend, rank| {
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

/// Rounds without a look at what came: each gathers what the device made of the round before, beside other work.
fn parts_are_gathered_together(connect: Connect<'_>, sizes: &[usize]) {
    const ROUNDS: usize = 6;
    for &size in sizes {
        on_ranks(connect(size), |backend, rank| {
            let me = rank.rank();
            for rows in [0, 1, 5] {
                let ids: Vec<i32> = (0..rows * 3).map(|i| (me * 100 + i) as i32).collect();
                let mut own_ids = backend.alloc(DType::I32, rows.max(1), 3).unwrap();
                if rows > 0 {
                    backend.upload(bytemuck::cast_slice(&ids), own_ids.head_mut(rows)).unwrap();
                }
                let mut x = upload(backend, rows, 7, &vec![me as f32; rows * 7]);
                let mut beside = upload(backend, 1, 4, &[1.0; 4]);
                let mut all = backend.alloc(DType::F32, (rows * size).max(1), 7).unwrap();
                let mut all_ids = backend.alloc(DType::I32, (rows * size).max(1), 3).unwrap();
                for _ in 0..ROUNDS {
                    let mut times = 0;
                    let parts = &mut [
                        (x.head(rows), all.head_mut(rows * size)),
                        (own_ids.head(rows), all_ids.head_mut(rows * size)),
                    ];
                    let meanwhile = &mut || {
                        times += 1;
                        backend.scale(2.0, beside.view_mut())
                    };
                    rank.all_gather_equal(parts, meanwhile).unwrap();
                    assert_eq!(times, 1);
                    // The next rank's rows, and one more.
                    let next = (me + 1) % size * rows..(me + 1) % size * rows + rows;
                    backend.copy_rows(all.head(rows * size).rows_range(next), x.head_mut(rows)).unwrap();
                    let one = upload(backend, rows, 7, &vec![1.0; rows * 7]);
                    backend.add_scaled(one.head(rows), 1.0, x.head_mut(rows)).unwrap();
                }
                assert_eq!(download(backend, beside.view()), [(1 << ROUNDS) as f32; 4]);
                let found = download(backend, all.head(rows * size));
                for (at, &value) in found.iter().enumerate() {
                    let from = (at / 7 / rows + ROUNDS - 1) % size;
                    assert_eq!(
                        value,
                        (from + ROUNDS - 1) as f32,
                        "rank {me} of {size}, {rows} rows, element {at}"
                    );
                }
                let mut found = vec![0i32; rows * size * 3];
                if rows > 0 {
                    backend
                        .download(all_ids.head(rows * size), bytemuck::cast_slice_mut(&mut found))
                        .unwrap();
                }
                let expected = (0..size).flat_map(|r| (0..rows * 3).map(move |i| (r * 100 + i) as i32));
                assert!(found.iter().copied().eq(expected), "rank {me} of {size}: {found:?}");
            }
        });
    }
}

fn rows_with_gaps_and_of_any_type_travel(connect: Connect<'_>, sizes: &[usize]) {
    let size = largest(sizes);
    on_ranks(connect(size), |backend, rank| {
        let me = rank.rank();
        // Row i of rank r for rank d holds r * 16 + d * 4 + i, in the middle columns of a wider matrix.
        let value = |r: usize, d: usize, i: usize| (r * 16 + d * 4 + i) as f32;
        let wide: Vec<bf16> = (0..size * 2 * 6)
            .map(|at| {
                bf16::from_f32(if (2..5).contains(&(at % 6)) { value(me, at / 12, at / 6 % 2) } else { -1.0 })
            })
            .collect();
        let mut rows = backend.alloc(DType::Bf16, size * 2, 6).unwrap();
        backend.upload(bytemuck::cast_slice(&wide), rows.view_mut()).unwrap();
        let mut out = backend.alloc(DType::Bf16, size * 2, 7).unwrap();
        let counts = vec![2; size];
        let target = out.view_mut().cols_range(1..4);
        rank.all_to_all_rows(rows.view().cols_range(2..5), &counts, target, &counts).unwrap();
        let mut found = vec![bf16::ONE; size * 2 * 7];
        backend.download(out.view(), bytemuck::cast_slice_mut(&mut found)).unwrap();
        for (at, x) in found.iter().enumerate() {
            let (row, col) = (at / 7, at % 7);
            let expected = if (1..4).contains(&col) { value(row / 2, me, row % 2) } else { 0.0 };
            assert_eq!(x.to_f32(), expected, "all-to-all: row {row}, column {col} on rank {me}");
        }

        let own = upload(backend, 2, 5, &[me as f32; 10]);
        let mut all = backend.alloc(DType::F32, 2 * size, 4).unwrap();
        let target = all.view_mut().cols_range(1..3);
        rank.all_gather_rows(own.view().cols_range(0..2), &counts, target).unwrap();
        for (at, x) in download(backend, all.view()).into_iter().enumerate() {
            let expected = if (1..3).contains(&(at % 4)) { (at / 8) as f32 } else { 0.0 };
            assert_eq!(x, expected, "all-gather: element {at} on rank {me}");
        }

        let (to, from) = ((me + 1) % size, (me + size - 1) % size);
        let mut one = backend.alloc(DType::F32, 2, 3).unwrap();
        let target = one.view_mut().cols_range(2..3);
        rank.send_receive_rows(Some((to, own.view().cols_range(3..4))), Some((from, target))).unwrap();
        assert_eq!(download(backend, one.view()), [0.0, 0.0, from as f32, 0.0, 0.0, from as f32]);
    });
}

fn pairs_exchange_rows_while_others_look_on(connect: Connect<'_>, sizes: &[usize]) {
    for &size in sizes {
        on_ranks(connect(size), |backend, rank| {
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

fn split_makes_groups_that_work_by_themselves(connect: Connect<'_>, sizes: &[usize]) {
    let size = largest(sizes);
    let sums = on_ranks(connect(size), |backend, rank| {
        let me = rank.rank();
        let mut group = rank.split(me % 2).unwrap();
        assert_eq!((group.rank(), group.size()), (me / 2, (size + 1 - me % 2) / 2));
        let mut x = upload(backend, 1, 1, &[me as f32]);
        group.all_reduce_sum(x.view_mut()).unwrap();
        let sum = download(backend, x.view())[0];
        // The whole world still works, and goes on when a part of it has ended.
        drop(group);
        rank.all_reduce_sum(x.view_mut()).unwrap();
        (sum, download(backend, x.view())[0])
    });
    let of = |parity: usize| (0..size).filter(|r| r % 2 == parity).sum::<usize>() as f32;
    let all: f32 = (0..size).map(|r| of(r % 2)).sum();
    assert_eq!(sums, (0..size).map(|r| (of(r % 2), all)).collect::<Vec<_>>());
}

fn a_leaving_rank_releases_the_others(connect: Connect<'_>, sizes: &[usize]) {
    let size = largest(sizes);
    let last = format!("rank {}", size - 1);
    let mut world = connect(size);
    let gone = world.pop().unwrap();
    std::thread::scope(|scope| {
        let waiting: Vec<_> =
            world.iter_mut().map(|(_, rank)| scope.spawn(move || rank.barrier().unwrap_err())).collect();
        drop(gone);
        for error in waiting {
            let error = error.join().unwrap().to_string();
            assert!(error.contains(&last), "{error}");
        }
    });
}
