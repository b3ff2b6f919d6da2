//! The world of one rank: every exchange is a copy to itself.

use std::sync::Arc;

use super::Communicator;
use crate::backend::{Backend, View, ViewMut};
use crate::error::Result;

/// A group with a single member.
pub struct Solo {
    backend: Arc<dyn Backend>,
}

impl Solo {
    /// The group of this one rank.
    pub fn new(backend: Arc<dyn Backend>) -> Self {
        Solo { backend }
    }
}

impl Communicator for Solo {
    fn rank(&self) -> usize {
        0
    }

    fn size(&self) -> usize {
        1
    }

    fn all_reduce_sum(&mut self, _x: ViewMut<'_>) -> Result<()> {
        Ok(())
    }

    fn reduce_scatter_rows(&mut self, input: View<'_>, _counts: &[usize], out: ViewMut<'_>) -> Result<()> {
        self.backend.copy_rows(input, out)
    }

    fn all_gather_rows(&mut self, own: View<'_>, _counts: &[usize], out: ViewMut<'_>) -> Result<()> {
        self.backend.copy_rows(own, out)
    }

    fn all_gather_equal(
        &mut self,
        parts: &mut [(View<'_>, ViewMut<'_>)],
        meanwhile: &mut dyn FnMut() -> Result<()>,
    ) -> Result<()> {
        for (own, out) in parts {
            self.backend.copy_rows(*own, out.reborrow())?;
        }
        meanwhile()
    }

    fn all_gather_counts(&mut self, own: &[u32], out: &mut [u32]) -> Result<()> {
        out.copy_from_slice(own);
        Ok(())
    }

    fn exchange_counts(&mut self, sent: &[u32], received: &mut [u32]) -> Result<()> {
        received.copy_from_slice(sent);
        Ok(())
    }

    fn all_to_all_rows(
        &mut self,
        rows: View<'_>,
        _sent: &[usize],
        out: ViewMut<'_>,
        _received: &[usize],
    ) -> Result<()> {
        self.backend.copy_rows(rows, out)
    }

    fn send_receive_rows(
        &mut self,
        sent: Option<(usize, View<'_>)>,
        received: Option<(usize, ViewMut<'_>)>,
    ) -> Result<()> {
        match (sent, received) {
            (Some((0, rows)), Some((0, out))) => self.backend.copy_rows(rows, out),
            (None, None) => Ok(()),
            (sent, received) => panic!(
                "a world of one sends to {:?} and receives from {:?}",
                sent.map(|(to, _)| to),
                received.map(|(from, _)| from)
            ),
        }
    }

    fn barrier(&mut self) -> Result<()> {
        Ok(())
    }

    fn split(&mut self, _color: usize) -> Result<Box<dyn Communicator>> {
        Ok(Box::new(Solo { backend: Arc::clone(&self.backend) }))
    }
}
