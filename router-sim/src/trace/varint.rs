//! Variable-length integers (LEB128), and a cursor over a payload that never reads past its end.

/// Appends `value`, 7 bits per byte, lowest first; the top bit says that more follow.
pub fn put(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// Maps small numbers of either sign to small unsigned ones.
pub fn zigzag(value: i64) -> u64 {
    ((value << 1) ^ (value >> 63)) as u64
}

/// The inverse of [`zigzag`].
pub fn unzigzag(value: u64) -> i64 {
    (value >> 1) as i64 ^ -((value & 1) as i64)
}

/// Puts a varint together byte by byte.
#[derive(Default)]
pub struct Decoder {
    value: u64,
    shift: u32,
}

impl Decoder {
    /// Takes the next byte; `Some` with the value after the last one.
    ///
    /// # Errors
    /// When the number does not fit 64 bits.
    pub fn push(&mut self, byte: u8) -> Result<Option<u64>, String> {
        let bits = u64::from(byte & 0x7f);
        if self.shift > 63 || (self.shift == 63 && bits > 1) {
            return Err("a varint exceeds 64 bits".into());
        }
        self.value |= bits << self.shift;
        self.shift += 7;
        Ok((byte & 0x80 == 0).then_some(self.value))
    }
}

/// The unread rest of a payload.
pub struct Cursor<'a>(pub &'a [u8]);

impl<'a> Cursor<'a> {
    /// The next `n` bytes.
    pub fn take(&mut self, n: usize) -> Result<&'a [u8], String> {
        match self.0.split_at_checked(n) {
            Some((head, rest)) => {
                self.0 = rest;
                Ok(head)
            }
            None => Err(format!("{n} bytes are due where the payload has {} left", self.0.len())),
        }
    }

    /// The next byte.
    pub fn byte(&mut self) -> Result<u8, String> {
        Ok(self.take(1)?[0])
    }

    /// The next varint.
    pub fn varint(&mut self) -> Result<u64, String> {
        let mut decoder = Decoder::default();
        loop {
            if let Some(value) = decoder.push(self.byte()?)? {
                return Ok(value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn known_bytes_and_refusals() {
        let bytes = |value| {
            let mut out = Vec::new();
            put(&mut out, value);
            out
        };
        assert_eq!(bytes(0), [0]);
        assert_eq!(bytes(300), [0xac, 2]);
        assert_eq!(bytes(u64::MAX).len(), 10);
        assert_eq!([0, -1, 1, -2].map(zigzag), [0, 1, 2, 3]);
        assert!(Cursor(&[0x80]).varint().unwrap_err().contains("has 0 left"));
        assert!(Cursor(&[0xff; 11]).varint().unwrap_err().contains("64 bits"));
        let mut too_large = bytes(u64::MAX);
        too_large[9] = 2;
        assert!(Cursor(&too_large).varint().unwrap_err().contains("64 bits"));
    }

    proptest! {
        #[test]
        fn round_trip(value: u64, signed: i64, shift in 0u32..64) {
            let mut out = Vec::new();
            put(&mut out, value >> shift);
            let mut cursor = Cursor(&out);
            prop_assert_eq!(cursor.varint().unwrap(), value >> shift);
            prop_assert!(cursor.0.is_empty());
            prop_assert_eq!(unzigzag(zigzag(signed)), signed);
        }
    }
}
