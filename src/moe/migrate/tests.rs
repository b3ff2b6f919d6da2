use super::*;
use crate::backend::Precision;
use crate::backend::ViewMut;
use crate::backend::reference::ReferenceBackend;
use crate::comm::Communicator;
use crate::comm::solo::Solo;
use crate::comm::tests::worlds;
use crate::support::moe_rank;
use crate::support::threads::on_threads;

const SHAPE: ExpertShape = ExpertShape { hidden: 70, intermediate: 33, bias: true, dtype: DType::F32 };

fn rank(world: Box<dyn Communicator>, expert_tp: usize) -> Rank {
    moe_rank::rank(Arc::new(ReferenceBackend), world, expert_tp, Precision::F32, Arc::default())
}

/// Weights that are this expert's and nobody else's.
fn expert(backend: &dyn Backend, shape: ExpertShape, number: usize) -> Mlp {
    let mut mlp = shape.alloc(backend).unwrap();
    for (i, part) in mlp.parts.iter_mut().enumerate() {
        let element = |j: usize| match part.dtype().bytes() {
            1 => vec![(number * 83 + i * 29 + j * 7) as u8],
            _ => ((number * 1_000_000 + i * 100_000 + j) as f32).to_le_bytes().to_vec(),
        };
        let bytes: Vec<u8> = (0..part.rows() * part.cols()).flat_map(element).collect();
        backend.upload(&bytes, part.view_mut()).unwrap();
    }
    mlp
}

fn bytes_of(backend: &dyn Backend, mlp: &Mlp) -> Vec<u8> {
    let mut all = Vec::new();
    for part in &mlp.parts {
        let mut bytes = vec![0; part.rows() * part.cols() * part.dtype().bytes()];
        backend.download(part.view(), &mut bytes).unwrap();
        all.extend(bytes);
    }
    all
}

fn placement(map: &[i32]) -> Placement {
    let experts = map.iter().max().unwrap() + 1;
    Placement::new(2, map.len() / 2, experts as usize, vec![3], vec![map.to_vec()]).unwrap()
}

/// Two ranks, or two halves of each, take an expert from each other and shuffle the others.
#[test]
fn weights_arrive_whole_and_slots_follow_the_placement() {
    let (old, new) = (placement(&[0, 1, EMPTY, 2, 3, 0]), placement(&[2, EMPTY, 0, 1, 3, 0]));
    let leg = |expert, from, slot, to| Leg { layer: 0, expert, from, slot, to, place: 0 };
    let legs: Arc<[Leg]> = [leg(1, 0, 1, 1), leg(2, 1, 0, 0)].into();
    let landed =
        [Landed { layer: 0, rank: 0, place: 0, slot: 0 }, Landed { layer: 0, rank: 1, place: 0, slot: 0 }];
    let dtypes = [DType::F32, DType::F8, DType::I4x2];
    let cases = dtypes.into_iter().flat_map(|dtype| [(dtype, 1), (dtype, 2)]);
    for ((dtype, expert_tp), world) in cases.flat_map(|case| worlds(2 * case.1).map(move |w| (case, w))) {
        let shape = ExpertShape { dtype, ..SHAPE };
        on_threads(world, |(_, end)| {
            let mut rank = rank(end, expert_tp);
            let me = rank.world.rank() / expert_tp;
            let backend = rank.backend.clone();
            let held = old.layer(0).slots_of_rank(me).iter();
            let mut slots: Vec<Option<Mlp>> =
                held.map(|&e| Some(expert(backend.as_ref(), shape, e.max(0) as usize))).collect();
            let mut staging = Staging::new(backend.as_ref(), 1, shape, 3).unwrap();
            staging.reserve_wire(&mut rank).unwrap();
            for span in [0..1, 1..20_000, 20_000..20_001, 20_001..WHOLE] {
                let slice = Slice { legs: legs.clone(), span };
                let sums = staging.transfer(&mut rank, |_| &slots, &slice).unwrap();
                assert!(sums.sent.is_some() && sums.received.is_some());
            }
            let landed = landed.into_iter().filter(|landed| landed.rank == me);
            staging.switch(&mut slots, (me, old.layer(0), new.layer(0)), landed);
            for (slot, &wanted) in slots.iter().zip(new.layer(0).slots_of_rank(me)) {
                if wanted != EMPTY {
                    let expected = expert(backend.as_ref(), shape, wanted as usize);
                    let found = bytes_of(backend.as_ref(), slot.as_ref().unwrap());
                    assert!(
                        found == bytes_of(backend.as_ref(), &expected),
                        "{dtype:?}, rank {me}: expert {wanted}"
                    );
                }
            }
        });
    }
}

/// A world of one in which a bit flips on the way.
struct Flipping(Solo, usize);

impl Communicator for Flipping {
    fn rank(&self) -> usize {
        0
    }
    fn size(&self) -> usize {
        1
    }
    fn send_receive_rows(
        &mut self,
        sent: Option<(usize, View<'_>)>,
        received: Option<(usize, ViewMut<'_>)>,
    ) -> Result<()> {
        let (from, mut out) = received.expect("the test receives");
        self.0.send_receive_rows(sent, Some((from, out.reborrow())))?;
        if self.1 < out.cols() {
            let mut one = [0u8; 4];
            let at = out.rows_range(0..1).cols_range(self.1..self.1 + 1);
            ReferenceBackend.download(at.as_view(), &mut one)?;
            one[3] ^= 1;
            ReferenceBackend.upload(&one, at)?;
        }
        Ok(())
    }
    fn all_reduce_sum(&mut self, _: ViewMut<'_>) -> Result<()> {
        unreachable!("not part of a transfer")
    }
    fn reduce_scatter_rows(&mut self, _: View<'_>, _: &[usize], _: ViewMut<'_>) -> Result<()> {
        unreachable!("not part of a transfer")
    }
    fn all_gather_rows(&mut self, _: View<'_>, _: &[usize], _: ViewMut<'_>) -> Result<()> {
        unreachable!("not part of a transfer")
    }
    fn all_gather_equal(
        &mut self,
        _: &mut [(View<'_>, ViewMut<'_>)],
        _: &mut dyn FnMut() -> Result<()>,
    ) -> Result<()> {
        unreachable!("not part of a transfer")
    }
    fn all_gather_counts(&mut self, _: &[u32], _: &mut [u32]) -> Result<()> {
        unreachable!("not part of a transfer")
    }
    fn exchange_counts(&mut self, _: &[u32], _: &mut [u32]) -> Result<()> {
        unreachable!("not part of a transfer")
    }
    fn all_to_all_rows(&mut self, _: View<'_>, _: &[usize], _: ViewMut<'_>, _: &[usize]) -> Result<()> {
        unreachable!("not part of a transfer")
    }
    fn barrier(&mut self) -> Result<()> {
        unreachable!("not part of a transfer")
    }
    fn split(&mut self, _: usize) -> Result<Box<dyn Communicator>> {
        unreachable!("not part of a transfer")
    }
}

#[test]
fn a_flipped_bit_shows_in_the_checksum() {
    let solo = || Solo::new(Arc::new(ReferenceBackend));
    // Far beyond the row: no bit flips. Its last places are in the largest part only.
    for (at, flips) in [(usize::MAX, false), (0, true), (SHAPE.intermediate * SHAPE.hidden - 1, true)] {
        let mut rank = rank(Box::new(Flipping(solo(), at)), 1);
        let slots = [Some(expert(&ReferenceBackend, SHAPE, 3)), None];
        let mut staging = Staging::new(&ReferenceBackend, 1, SHAPE, 3).unwrap();
        let legs = [Leg { layer: 0, expert: 3, from: 0, slot: 0, to: 0, place: 0 }].into();
        let sums = staging.transfer(&mut rank, |_| &slots, &Slice { legs, span: 0..WHOLE }).unwrap();
        assert_eq!(sums.sent != sums.received, flips, "bit at {at}: {sums:?}");
    }
}
