//! The rows of one call by whose they are.

/// Something of the routed rows, and the same of the shared expert's, which are numbered behind them. A side without rows may be absent.
pub struct Sides<T> {
    pub routed: Option<T>,
    pub shared: Option<T>,
    /// Routed rows.
    pub border: usize,
}

impl<T> Sides<T> {
    /// Whose a row is, and which one of them.
    pub fn of(&self, row: usize) -> (&T, usize) {
        let (side, row) = match row.checked_sub(self.border) {
            None => (&self.routed, row),
            Some(row) => (&self.shared, row),
        };
        (side.as_ref().expect("a side that has rows"), row)
    }

    /// Either side.
    pub fn any(&self) -> Option<&T> {
        self.routed.as_ref().or(self.shared.as_ref())
    }

    /// Something else of both sides.
    pub fn map<U>(self, mut to: impl FnMut(T) -> U) -> Sides<U> {
        Sides { routed: self.routed.map(&mut to), shared: self.shared.map(&mut to), border: self.border }
    }
}
