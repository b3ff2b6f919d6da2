//! Numbers of array files: element types, byte order, and what counts as a number of tokens or an expert id.

use half::{bf16, f16};

/// Element type of an array, in the names of the array formats.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Element {
    U8,
    U16,
    U32,
    U64,
    I8,
    I16,
    I32,
    I64,
    F16,
    Bf16,
    F32,
    F64,
}

impl Element {
    /// Bytes of one element.
    pub fn bytes(self) -> usize {
        match self {
            Element::U8 | Element::I8 => 1,
            Element::U16 | Element::I16 | Element::F16 | Element::Bf16 => 2,
            Element::U32 | Element::I32 | Element::F32 => 4,
            Element::U64 | Element::I64 | Element::F64 => 8,
        }
    }

    /// Not an integer type.
    pub fn is_float(self) -> bool {
        matches!(self, Element::F16 | Element::Bf16 | Element::F32 | Element::F64)
    }
}

/// One element as read.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Number {
    /// Any integer type.
    Int(i128),
    /// Any float type.
    Float(f64),
}

/// Element type and byte order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    /// What an element is.
    pub element: Element,
    /// Most significant byte first.
    pub big_endian: bool,
}

impl Layout {
    /// The usual byte order.
    pub fn little(element: Element) -> Self {
        Layout { element, big_endian: false }
    }

    /// The elements of `bytes`, a whole number of them.
    pub fn numbers(self, bytes: &[u8]) -> impl Iterator<Item = Number> + '_ {
        bytes.chunks_exact(self.element.bytes()).map(move |bytes| self.number(bytes))
    }

    fn number(self, bytes: &[u8]) -> Number {
        let mut low_first = [0; 8];
        low_first[..bytes.len()].copy_from_slice(bytes);
        if self.big_endian {
            low_first[..bytes.len()].reverse();
        }
        let word = u64::from_le_bytes(low_first);
        match self.element {
            Element::U8 | Element::U16 | Element::U32 | Element::U64 => Number::Int(i128::from(word)),
            Element::I8 => Number::Int(i128::from(word as u8 as i8)),
            Element::I16 => Number::Int(i128::from(word as u16 as i16)),
            Element::I32 => Number::Int(i128::from(word as u32 as i32)),
            Element::I64 => Number::Int(i128::from(word as i64)),
            Element::F16 => Number::Float(f16::from_bits(word as u16).to_f64()),
            Element::Bf16 => Number::Float(bf16::from_bits(word as u16).to_f64()),
            Element::F32 => Number::Float(f64::from(f32::from_bits(word as u32))),
            Element::F64 => Number::Float(f64::from_bits(word)),
        }
    }
}

impl Number {
    /// A number of tokens: times `scale` and rounded where a scale is given, otherwise a whole number.
    ///
    /// # Errors
    /// NaN, infinite, negative, not whole, or beyond 64 bits.
    pub fn tokens(self, scale: Option<f64>) -> Result<u64, String> {
        let value = match (self, scale) {
            (Number::Int(n), None) => {
                return u64::try_from(n).map_err(|_| match n < 0 {
                    true => format!("{n} tokens are negative"),
                    false => format!("{n} tokens exceed 64 bits"),
                });
            }
            (Number::Int(n), Some(scale)) => n as f64 * scale,
            (Number::Float(x), scale) => x * scale.unwrap_or(1.0),
        };
        if !value.is_finite() {
            return Err(format!("{value} is no number of tokens"));
        }
        if value < 0.0 {
            return Err(format!("{value} tokens are negative"));
        }
        if value >= u64::MAX as f64 {
            return Err(format!("{value} tokens exceed 64 bits"));
        }
        if scale.is_none() && value.fract() != 0.0 {
            return Err(format!(
                "{value} is no whole number of tokens; give a scale to round shares or averages"
            ));
        }
        Ok(value.round() as u64)
    }

    /// An expert id; its range is checked where the number of experts is known.
    ///
    /// # Errors
    /// Not a whole number.
    pub fn id(self) -> Result<i64, String> {
        match self {
            Number::Int(n) => i64::try_from(n).map_err(|_| format!("expert {n} is out of range")),
            Number::Float(x) if x.fract() == 0.0 && x.abs() < 1e9 => Ok(x as i64),
            Number::Float(x) => Err(format!("{x} is no expert id")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_elements_in_both_byte_orders() {
        let read = |element, big_endian, bytes: &[u8]| {
            Layout { element, big_endian }.numbers(bytes).collect::<Vec<_>>()
        };
        for (element, little, value) in [
            (Element::U8, &[200][..], Number::Int(200)),
            (Element::I8, &[200], Number::Int(-56)),
            (Element::U16, &[1, 2], Number::Int(513)),
            (Element::I16, &[0xff, 0xff], Number::Int(-1)),
            (Element::U32, &[1, 0, 0, 0x80], Number::Int(0x8000_0001)),
            (Element::I32, &[0xfe, 0xff, 0xff, 0xff], Number::Int(-2)),
            (Element::U64, &[0xff; 8], Number::Int(i128::from(u64::MAX))),
            (Element::I64, &[0xff; 8], Number::Int(-1)),
            (Element::F16, &[0, 0x3e], Number::Float(1.5)),
            (Element::Bf16, &[0x20, 0x40], Number::Float(2.5)),
            (Element::F32, &[0, 0, 0x20, 0x40], Number::Float(2.5)),
            (Element::F64, &[0, 0, 0, 0, 0, 0, 4, 0x40], Number::Float(2.5)),
        ] {
            let big: Vec<u8> = little.iter().rev().copied().collect();
            assert_eq!(read(element, false, little), [value], "{element:?}");
            assert_eq!(read(element, true, &big), [value], "{element:?} big-endian");
        }
    }

    #[test]
    fn what_counts_as_tokens() {
        assert_eq!(Number::Int(7).tokens(None), Ok(7));
        assert_eq!(Number::Float(7.0).tokens(None), Ok(7));
        assert_eq!(Number::Float(0.25).tokens(Some(10.0)), Ok(3));
        assert_eq!(Number::Int(i128::from(u64::MAX)).tokens(None), Ok(u64::MAX));
        for (number, expected) in [
            (Number::Int(-1), "-1 tokens are negative"),
            (Number::Float(-0.5), "negative"),
            (Number::Float(f64::NAN), "NaN is no number of tokens"),
            (Number::Float(f64::INFINITY), "inf is no number"),
            (Number::Float(2e19), "exceed 64 bits"),
            (Number::Float(0.5), "no whole number"),
        ] {
            let message = number.tokens(None).unwrap_err();
            assert!(message.contains(expected), "{message:?} should contain {expected:?}");
        }
        assert!(Number::Float(1.5).id().is_err());
    }
}
