//! How expert weights move while the old ones serve: slice by slice into staging places, and from there into their slots by
//! an exchange of pointers.
//!
//! A rank owns a few staging places, each with the memory of one expert in the backend's own layout. Weights on their way
//! ([`Leg`]) fill a place piece by piece; no slot is touched until a [`Switch`] brings a whole placement into force. What the
//! weights replace becomes staging memory in turn, so nothing is allocated, freed or copied twice. Sender and receiver
//! make a checksum of every piece, each from its own memory, for the engine to compare.

use std::ops::Range;
use std::sync::Arc;

use router_sim::placement::{EMPTY, LayerPlacement, Placement};

use crate::backend::quantized::Quantized;
use crate::backend::{Backend, DType, HostData, HostMatrix, HostMlp, HostMlpBias, Mlp, Tensor, View};
use crate::error::{Error, Result};
use crate::layers::Rank;
use crate::metrics::CommOp;

/// A [`Slice::span`] counts in parts of a whole expert of which there are so many.
pub const WHOLE: u32 = 1 << 16;

/// No slice is larger, so that the memory for rows in flight is bounded.
pub const MAX_SLICE_BYTES: u64 = 8 << 20;

/// Pieces begin at multiples of so many elements, which keeps every copy aligned.
const STEP_ELEMENTS: u64 = 64;

/// Checksums are made of so many bytes at a time: they stay in the cache between the two looks.
const CHECK_BYTES: usize = 64 << 10;

/// One expert's weights on their way from a slot into a staging place. Ranks are expert-parallel ones: with a tensor split
/// inside experts, each of their parts sends its slice of the expert to the same part of the other rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Leg {
    /// MoE layer, counted from 0.
    pub layer: usize,
    /// Whose weights.
    pub expert: usize,
    /// Rank that sends.
    pub from: usize,
    /// The slot they are in, counted on that rank.
    pub slot: usize,
    /// Rank that receives.
    pub to: usize,
    /// The staging place they go to, counted on that rank.
    pub place: usize,
}

/// A piece of the weights that travel at the same time.
#[derive(Debug, Clone)]
pub struct Slice {
    /// What travels: at most one leg leaves each rank, and at most one reaches it.
    pub legs: Arc<[Leg]>,
    /// Which piece of each, in parts of [`WHOLE`]; pieces come in ascending order without gaps.
    pub span: Range<u32>,
}

/// CRC-32 of what a rank has sent and received of its legs so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Checksums {
    /// Of the leg that leaves it.
    pub sent: Option<u32>,
    /// Of the leg that reaches it, read back from the staging place.
    pub received: Option<u32>,
}

/// Weights in a staging place, and the slot they belong into.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Landed {
    /// MoE layer, counted from 0.
    pub layer: usize,
    /// Expert-parallel rank.
    pub rank: usize,
    /// Staging place, counted on that rank.
    pub place: usize,
    /// Slot, counted on that rank.
    pub slot: usize,
}

/// A placement that comes into force at a step border, on all ranks at the same one.
#[derive(Debug, Clone)]
pub struct Switch {
    /// On every rank it holds what is there already, in any order, and what has landed.
    pub placement: Arc<Placement>,
    /// What staging places hold.
    pub landed: Vec<Landed>,
}

/// The staging places of one rank.
pub struct Staging {
    places: Vec<Mlp>,
    sent: crc32fast::Hasher,
    received: crc32fast::Hasher,
    /// Bytes on their way into a checksum.
    bytes: Vec<u8>,
    /// The experts of one layer's slots while they are exchanged.
    held: Vec<i32>,
}

impl Staging {
    /// `places` places for experts of this shape, on a rank with so many slots per layer.
    ///
    /// # Errors
    /// [`Error::Memory`] when the device is full.
    pub fn new(backend: &dyn Backend, places: usize, shape: ExpertShape, slots: usize) -> Result<Staging> {
        Ok(Staging {
            places: (0..places).map(|_| shape.alloc(backend)).collect::<Result<_>>()?,
            sent: crc32fast::Hasher::new(),
            received: crc32fast::Hasher::new(),
            bytes: vec![0; if places == 0 { 0 } else { CHECK_BYTES }],
            held: Vec::with_capacity(slots),
        })
    }

    /// Takes the memory that slices on their way need, so that none is taken while serving. Collective.
    ///
    /// # Errors
    /// As [`crate::comm::Communicator::send_receive_rows`].
    pub fn reserve_wire(&mut self, rank: &mut Rank) -> Result<()> {
        let (me, pieces) = (rank.world.rank(), self.places.first().map_or(0, |place| place.parts.len()));
        let whole: usize = self.places.first().map_or(0, Mlp::bytes);
        for part in 0..pieces {
            // A slice has the same share of every part.
            let share = (MAX_SLICE_BYTES as f64 / whole.max(1) as f64).min(1.0);
            let from = &self.places[0].parts[part];
            let elements = ((from.rows() * from.cols()) as f64 * share) as usize;
            let mut copy = rank.backend.alloc(from.dtype(), 1, elements.max(1))?;
            // Twice, because communicators may take turns between two buffers.
            for _ in 0..2 {
                let (sent, received) = (from.reshaped(1, elements), copy.reshaped_mut(1, elements));
                rank.world.send_receive_rows(Some((me, sent)), Some((me, received)))?;
            }
        }
        Ok(())
    }

    /// Does this rank's part of a slice: sends from the slots that `slots_of` finds for a layer, receives into a staging
    /// place, and checks both. Collective over the world, ranks without a leg included.
    ///
    /// # Errors
    /// [`Error::Peer`] when another rank is gone. After any other error the ranks are still in step, and what has
    /// arrived so far is worthless.
    pub fn transfer<'a>(
        &mut self,
        rank: &mut Rank,
        slots_of: impl Fn(usize) -> &'a [Option<Mlp>],
        slice: &Slice,
    ) -> Result<Checksums> {
        let (me, x) = (rank.world.rank() / rank.expert_tp, rank.world.rank() % rank.expert_tp);
        let world_rank = |ep_rank: usize| ep_rank * rank.expert_tp + x;
        let source = slice.legs.iter().find(|leg| leg.from == me).map(|leg| {
            let held = slots_of(leg.layer)[leg.slot].as_ref();
            (world_rank(leg.to), held.unwrap_or_else(|| panic!("{leg:?} leaves an empty slot")))
        });
        let target = slice.legs.iter().find(|leg| leg.to == me).map(|leg| (world_rank(leg.from), leg.place));
        if slice.span.start == 0 {
            (self.sent, self.received) = (crc32fast::Hasher::new(), crc32fast::Hasher::new());
        }
        let mut outcome = Ok(());
        for part in 0..self.places[0].parts.len() {
            match self.exchange(rank, source, target, part, &slice.span) {
                Err(gone @ Error::Peer { .. }) => return Err(gone),
                // The others still expect this rank at the other parts.
                other => outcome = outcome.and(other),
            }
        }
        outcome.map(|()| Checksums {
            sent: source.map(|_| self.sent.clone().finalize()),
            received: target.map(|_| self.received.clone().finalize()),
        })
    }

    /// Sends and receives a piece of one part.
    fn exchange(
        &mut self,
        rank: &mut Rank,
        source: Option<(usize, &Mlp)>,
        target: Option<(usize, usize)>,
        part: usize,
        span: &Range<u32>,
    ) -> Result<()> {
        let Staging { places, sent, received, bytes, .. } = self;
        let outgoing = source.map(|(to, mlp)| (to, piece(&mlp.parts[part], span)));
        let incoming = target.map(|(from, place)| {
            let tensor = &mut places[place].parts[part];
            let (elements, range) = (tensor.rows() * tensor.cols(), piece_of(tensor, span));
            (from, tensor.reshaped_mut(1, elements).cols_range(range))
        });
        let me = rank.world.rank();
        let size = |view: View<'_>| view.cols() * view.dtype().bytes();
        let out_bytes = outgoing.as_ref().filter(|(to, _)| *to != me).map_or(0, |(_, view)| size(*view));
        let in_bytes =
            incoming.as_ref().filter(|(from, _)| *from != me).map_or(0, |(_, view)| size(view.as_view()));
        rank.world.send_receive_rows(outgoing, incoming)?;
        rank.clock.meter().exchange(CommOp::Migrate, out_bytes, in_bytes);
        if let Some((_, view)) = outgoing {
            checksum(rank.backend.as_ref(), view, bytes, sent)?;
        }
        if let Some((_, place)) = target {
            checksum(rank.backend.as_ref(), piece(&places[place].parts[part], span), bytes, received)?;
        }
        Ok(())
    }

    /// Brings the slots of one layer from placement `old` to `new` by exchanging pointers: with what landed in this rank's
    /// staging places, and among themselves.
    ///
    /// # Panics
    /// When the rank does not hold what `new` wants of it.
    pub fn switch(
        &mut self,
        slots: &mut [Option<Mlp>],
        (rank, old, new): (usize, LayerPlacement<'_>, LayerPlacement<'_>),
        landed: impl Iterator<Item = Landed> + Clone,
    ) {
        let wanted = new.slots_of_rank(rank);
        let fills = |slot: usize| landed.clone().any(|l| l.slot == slot);
        self.held.clear();
        self.held.extend_from_slice(old.slots_of_rank(rank));
        for slot in 0..slots.len() {
            let expert = wanted[slot];
            if expert == EMPTY || expert == self.held[slot] || fills(slot) {
                continue;
            }
            // Slots that are in order keep what they have.
            let giver = (0..slots.len())
                .find(|&other| self.held[other] == expert && (wanted[other] != expert || fills(other)));
            let giver = giver.unwrap_or_else(|| {
                panic!("rank {rank} holds {:?} and {wanted:?} is asked for", old.slots_of_rank(rank))
            });
            slots.swap(slot, giver);
            self.held.swap(slot, giver);
        }
        for Landed { place, slot, .. } in landed {
            let slot = slots[slot].as_mut().expect("slots of an engine that moves experts have memory");
            std::mem::swap(slot, &mut self.places[place]);
        }
    }
}

/// The shape of one rank's share of an expert.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExpertShape {
    /// Width of input and output.
    pub hidden: usize,
    /// Width between the matrices, on this rank.
    pub intermediate: usize,
    /// With biases.
    pub bias: bool,
    /// Type of the weights.
    pub dtype: DType,
}

impl ExpertShape {
    /// The memory of one expert in the backend's layout, zeroed.
    ///
    /// # Errors
    /// [`Error::Memory`] when the device is full.
    pub fn alloc(&self, backend: &dyn Backend) -> Result<Mlp> {
        let ExpertShape { hidden, intermediate, bias, dtype } = *self;
        let matrix = |n: usize, k: usize| HostMatrix {
            n,
            k,
            data: match dtype {
                DType::F32 => HostData::F32(vec![0.0; n * k]),
                DType::F8 | DType::I4x2 => HostData::Quantized(Quantized::zeros(n, k, dtype)),
                _ => HostData::Bf16(vec![half::bf16::ZERO; n * k].into()),
            },
        };
        let bias = bias.then(|| HostMlpBias {
            gate: vec![0.0; intermediate],
            up: vec![0.0; intermediate],
            down: vec![0.0; hidden],
        });
        let host = HostMlp {
            gate: matrix(intermediate, hidden),
            up: matrix(intermediate, hidden),
            down: matrix(hidden, intermediate),
            bias,
        };
        backend.pack_mlp(&host, dtype)
    }
}

/// The piece of a tensor, as a single row.
fn piece<'a>(tensor: &'a Tensor, span: &Range<u32>) -> View<'a> {
    tensor.reshaped(1, tensor.rows() * tensor.cols()).cols_range(piece_of(tensor, span))
}

/// Elements of a piece.
fn piece_of(tensor: &Tensor, span: &Range<u32>) -> Range<usize> {
    let elements = (tensor.rows() * tensor.cols()) as u64;
    let border = |at: u32| match at {
        WHOLE => elements as usize,
        _ => {
            let exact = u128::from(elements) * u128::from(at) / u128::from(WHOLE);
            (exact as u64 / STEP_ELEMENTS * STEP_ELEMENTS) as usize
        }
    };
    border(span.start)..border(span.end)
}

/// Adds the bytes of a single row.
fn checksum(
    backend: &dyn Backend,
    row: View<'_>,
    bytes: &mut [u8],
    hasher: &mut crc32fast::Hasher,
) -> Result<()> {
    let step = bytes.len() / row.dtype().bytes();
    for start in (0..row.cols()).step_by(step) {
        let some = row.cols_range(start..row.cols().min(start + step));
        let bytes = &mut bytes[..some.cols() * some.dtype().bytes()];
        backend.download(some, bytes)?;
        hasher.update(bytes);
    }
    Ok(())
}

#[cfg(test)]
mod tests;
