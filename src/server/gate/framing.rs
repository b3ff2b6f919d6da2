//! Where a request's body ends: RFC 9112, sections 6 and 7. Nothing is decoded here; hyper does that, and must find the
//! same end.

/// How far the body of a request has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Framing {
    /// This many bytes are to come.
    Length(u64),
    /// Chunks.
    Chunked {
        at: At,
        /// Bytes to come of the chunk; while its size is read, the size so far.
        left: u64,
    },
}

/// A place between the bytes of a chunked body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum At {
    /// Before the first digit of a size.
    Start,
    Size,
    /// Spaces after the size.
    SizeSpace,
    /// After a semicolon; nobody reads extensions.
    Extension,
    /// Before the line feed after a size.
    SizeLf,
    Data,
    /// Before the line break after a chunk.
    DataCr,
    DataLf,
    /// Where a trailer begins, or the empty line that ends the body.
    LastLines,
    Trailer,
    TrailerLf,
    LastLf,
    End,
    /// After a byte that no chunked body has there.
    Broken,
}

impl Framing {
    /// A request without a body, which is over with its head.
    pub const NONE: Framing = Framing::Length(0);
    /// A chunked body of which nothing has come.
    pub const CHUNKED: Framing = Framing::Chunked { at: At::Start, left: 0 };

    /// The next byte begins another request.
    pub fn is_complete(&self) -> bool {
        matches!(self, Framing::Length(0) | Framing::Chunked { at: At::End, .. })
    }

    /// The body is malformed; it has no end.
    pub fn is_broken(&self) -> bool {
        matches!(self, Framing::Chunked { at: At::Broken, .. })
    }

    /// Follows the body over `bytes`; how many of them belong to it.
    pub fn follow(&mut self, bytes: &[u8]) -> usize {
        match self {
            Framing::Length(left) => {
                let taken = usize::try_from(*left).unwrap_or(usize::MAX).min(bytes.len());
                *left -= taken as u64;
                taken
            }
            Framing::Chunked { at, left } => {
                let mut taken = 0;
                while taken < bytes.len() && !matches!(at, At::End | At::Broken) {
                    if *at == At::Data {
                        let data = usize::try_from(*left).unwrap_or(usize::MAX).min(bytes.len() - taken);
                        *left -= data as u64;
                        taken += data;
                        if *left == 0 {
                            *at = At::DataCr;
                        }
                    } else {
                        *at = at.after(bytes[taken], left).unwrap_or(At::Broken);
                        taken += usize::from(*at != At::Broken);
                    }
                }
                taken
            }
        }
    }
}

impl At {
    /// The place after `byte`; `None` where it may not stand. As strict as hyper's decoder, byte for byte.
    fn after(self, byte: u8, left: &mut u64) -> Option<At> {
        Some(match (self, byte) {
            (At::Start | At::Size, b'0'..=b'9' | b'a'..=b'f' | b'A'..=b'F') => {
                let digit = char::from(byte).to_digit(16).expect("a hexadecimal digit");
                *left = left.checked_mul(16)?.checked_add(digit.into())?;
                At::Size
            }
            (At::Size | At::SizeSpace, b' ' | b'\t') => At::SizeSpace,
            (At::Size | At::SizeSpace, b';') => At::Extension,
            (At::Size | At::SizeSpace | At::Extension, b'\r') => At::SizeLf,
            (At::Extension, b'\n') => return None,
            (At::Extension, _) => At::Extension,
            (At::SizeLf, b'\n') if *left == 0 => At::LastLines,
            (At::SizeLf, b'\n') => At::Data,
            (At::DataCr, b'\r') => At::DataLf,
            (At::DataLf, b'\n') => At::Start,
            (At::LastLines, b'\r') => At::LastLf,
            (At::LastLines, _) => At::Trailer,
            (At::Trailer, b'\r') => At::TrailerLf,
            (At::Trailer, _) => At::Trailer,
            (At::TrailerLf, b'\n') => At::LastLines,
            (At::LastLf, b'\n') => At::End,
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The bytes of a chunked body at the start of `stream`, from the grammar of RFC 9112, section 7.1, all at once; `None`
    /// where it is not whole, or none.
    fn reference(stream: &[u8]) -> Option<usize> {
        let line = |from: usize| {
            let rest = stream.get(from..)?;
            let end = rest.windows(2).position(|pair| pair == b"\r\n")?;
            Some((&rest[..end], from + end + 2))
        };
        let mut at = 0;
        loop {
            let (size, after) = line(at)?;
            let size = std::str::from_utf8(size.split(|&b| b == b';').next()?).ok()?;
            let digits = size.trim_end_matches([' ', '\t']);
            if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_hexdigit()) {
                return None;
            }
            let size = u64::from_str_radix(digits, 16).ok()?;
            at = after;
            if size == 0 {
                break;
            }
            let end = at.checked_add(usize::try_from(size).ok()?)?;
            if stream.get(end..end.checked_add(2)?)? != b"\r\n" {
                return None;
            }
            at = end + 2;
        }
        loop {
            let (trailer, after) = line(at)?;
            at = after;
            if trailer.is_empty() {
                return Some(at);
            }
        }
    }

    fn chunked() -> impl Strategy<Value = Vec<u8>> {
        let size = prop_oneof![Just(""), Just(" "), Just(";a=b"), Just(" \t;x"), Just(";")];
        let chunk = (prop::collection::vec(any::<u8>(), 1..20), size, any::<bool>());
        let trailer = prop_oneof![Just(""), Just("A: b\r\n"), Just("A: b\r\nC: d\r\n")];
        (prop::collection::vec(chunk, 0..5), trailer, "0{1,4}").prop_map(|(chunks, trailer, last)| {
            let mut body = Vec::new();
            for (data, extension, upper) in chunks {
                let size = if upper { format!("{:X}", data.len()) } else { format!("{:x}", data.len()) };
                body.extend(format!("{size}{extension}\r\n").bytes());
                body.extend(data);
                body.extend(b"\r\n");
            }
            body.extend(format!("{last}\r\n{trailer}\r\n").bytes());
            body
        })
    }

    /// Follows `stream` in pieces that end at `cuts`; the length of the body, where it has an end.
    fn follow(stream: &[u8], cuts: &[usize]) -> Option<usize> {
        let mut framing = Framing::CHUNKED;
        let (mut from, mut taken) = (0, 0);
        for &cut in cuts.iter().chain([&stream.len()]) {
            let piece = &stream[from..cut];
            let more = framing.follow(piece);
            taken += more;
            from = cut;
            if more < piece.len() {
                assert!(framing.is_complete() || framing.is_broken(), "{framing:?} left bytes behind");
                break;
            }
        }
        framing.is_complete().then_some(taken)
    }

    proptest! {
        #[test]
        fn chunks_end_where_the_grammar_says(body in chunked(), next in "[A-Z]{0,8}", noise in any::<(u8, prop::sample::Index)>(), spoil: bool) {
            let mut stream = body.clone();
            stream.extend(next.bytes());
            if spoil {
                let at = noise.1.index(stream.len());
                stream[at] = noise.0;
            } else {
                prop_assert_eq!(reference(&stream), Some(body.len()));
            }
            let whole = follow(&stream, &[]);
            // Bare line feeds inside extensions and bare returns inside trailers are refused here and by hyper.
            prop_assert!(whole == reference(&stream) || (spoil && whole.is_none()), "{:?} {:?}", whole, reference(&stream));
            for cut in 0..=stream.len() {
                prop_assert_eq!(follow(&stream, &[cut]), whole, "cut at {}", cut);
            }
            let every: Vec<usize> = (0..stream.len()).collect();
            prop_assert_eq!(follow(&stream, &every), whole);
        }
    }

    #[test]
    fn sizes_that_are_none_break_the_body() {
        for body in [
            "g\r\n",
            "\r\n",
            "-1\r\n",
            "0x1\r\n",
            " 1\r\n",
            "1 1\r\n",
            "1\nx",
            "ffffffffffffffffff\r\n",
            "1;\nx",
        ] {
            let mut framing = Framing::CHUNKED;
            assert!(
                framing.follow(body.as_bytes()) < body.len() && framing.is_broken(),
                "{body:?}: {framing:?}"
            );
        }
    }

    #[test]
    fn a_length_ends_by_counting() {
        let mut framing = Framing::Length(5);
        assert_eq!((framing.follow(b"abc"), framing.is_complete()), (3, false));
        assert_eq!((framing.follow(b"deGET"), framing.is_complete()), (2, true));
        assert!(Framing::NONE.is_complete());
    }
}
