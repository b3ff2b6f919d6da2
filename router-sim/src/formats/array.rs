//! Arrays in row-major order that are read one record, a slice along the first axis, at a time.

use std::io::Read;

use super::number::{Layout, Number};
use super::source::MAX_IN_MEMORY;

/// An array whose data are about to be read.
pub struct ArrayReader {
    /// What an element is.
    pub layout: Layout,
    /// Lengths of the axes.
    pub shape: Vec<usize>,
    data: Box<dyn Read + Send>,
    /// Records read so far, the one that failed included.
    read: usize,
    /// The data are cut: nothing more can be read.
    over: bool,
    bytes: Vec<u8>,
}

impl std::fmt::Debug for ArrayReader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ArrayReader({:?}, {:?}, {} read)", self.layout, self.shape, self.read)
    }
}

impl ArrayReader {
    /// `data` are the elements in row-major order, or with the first axis running fastest when `fortran` is set; then
    /// the whole array is read at once.
    ///
    /// # Errors
    /// Records without elements, sizes that overflow, or that exceed what may be held in memory.
    pub fn new(
        layout: Layout,
        shape: Vec<usize>,
        fortran: bool,
        data: Box<dyn Read + Send>,
    ) -> Result<Self, String> {
        if shape.iter().skip(1).any(|length| *length == 0) {
            return Err(format!("an array of shape {shape:?} has records without elements"));
        }
        let mut array = ArrayReader { layout, shape, data, read: 0, over: false, bytes: Vec::new() };
        let record = array.record_bytes()?;
        let whole = array.shape.first().copied().unwrap_or(1).checked_mul(record);
        if whole.is_none() {
            return Err(format!("an array of shape {:?} does not fit any memory", array.shape));
        }
        if fortran && array.shape.len() > 1 {
            array.turn_row_major()?;
        }
        Ok(array)
    }

    /// Bytes of one record.
    fn record_bytes(&self) -> Result<usize, String> {
        let elements = self.shape.iter().skip(1).try_fold(1usize, |n, len| n.checked_mul(*len));
        let bytes = elements.and_then(|n| n.checked_mul(self.layout.element.bytes()));
        bytes.filter(|n| *n as u64 <= MAX_IN_MEMORY).ok_or_else(|| {
            format!(
                "a record of an array of shape {:?} exceeds the limit of {MAX_IN_MEMORY} bytes",
                self.shape
            )
        })
    }

    /// Turns an array whose first axis runs fastest around.
    fn turn_row_major(&mut self) -> Result<(), String> {
        let elements: usize = self.shape.iter().product();
        let size = self.layout.element.bytes();
        let bytes = elements as u64 * size as u64;
        if bytes > MAX_IN_MEMORY {
            return Err(format!(
                "{bytes} bytes in Fortran order exceed the limit of {MAX_IN_MEMORY}; save it in C order"
            ));
        }
        let mut columns = Vec::new();
        self.data.by_ref().take(bytes).read_to_end(&mut columns).map_err(|e| e.to_string())?;
        if (columns.len() as u64) < bytes {
            return Err(format!("cut after {} of {bytes} bytes", columns.len()));
        }
        let mut rows = Vec::with_capacity(columns.len());
        let mut index = vec![0usize; self.shape.len()];
        let mut strides = vec![1usize; self.shape.len()];
        for axis in 1..self.shape.len() {
            strides[axis] = strides[axis - 1] * self.shape[axis - 1];
        }
        for _ in 0..elements {
            let at: usize = index.iter().zip(&strides).map(|(i, stride)| i * stride).sum();
            rows.extend_from_slice(&columns[at * size..(at + 1) * size]);
            for axis in (0..index.len()).rev() {
                index[axis] += 1;
                if index[axis] < self.shape[axis] {
                    break;
                }
                index[axis] = 0;
            }
        }
        let rest = std::mem::replace(&mut self.data, Box::new(std::io::empty()));
        self.data = Box::new(std::io::Cursor::new(rows).chain(rest));
        Ok(())
    }

    /// Records that there are.
    pub fn records(&self) -> usize {
        self.shape.first().copied().unwrap_or(1)
    }

    /// Number of the record that is read next.
    pub fn next_index(&self) -> usize {
        self.read
    }

    /// Number of the record read last.
    pub fn record(&self) -> u64 {
        self.read.saturating_sub(1) as u64
    }

    /// The next record; `None` at the end.
    ///
    /// # Errors
    /// The data are cut, or do not end where they should. Nothing more is read then.
    pub fn next_record(&mut self) -> Result<Option<impl Iterator<Item = Number> + '_>, String> {
        if self.over {
            return Ok(None);
        }
        if self.read == self.records() {
            self.over = true;
            let mut extra = [0];
            return match self.data.read(&mut extra).map_err(|e| e.to_string())? {
                0 => Ok(None),
                _ => Err(format!("data follow the {} records of shape {:?}", self.read, self.shape)),
            };
        }
        self.read += 1;
        let due = self.record_bytes()?;
        self.bytes.clear();
        // Grows with what arrives: a shape that lies costs no memory.
        let arrived = self.data.by_ref().take(due as u64).read_to_end(&mut self.bytes);
        let arrived = arrived.inspect_err(|_| self.over = true).map_err(|e| e.to_string())?;
        if arrived < due {
            self.over = true;
            return Err(format!("cut after {arrived} of {due} bytes"));
        }
        Ok(Some(self.layout.numbers(&self.bytes)))
    }
}
