//! NumPy's `.npy`, versions 1 to 3: a header that is a Python dictionary, then the elements.
//! Format: numpy.lib.format in the NumPy manual.

use std::io::{self, Read, Write};

use super::array::ArrayReader;
use super::number::{Element, Layout};

/// First bytes of a file.
pub const MAGIC: &[u8] = b"\x93NUMPY";
/// Largest header that is read.
const MAX_HEADER_BYTES: usize = 64 << 10;
/// Most axes of an array.
const MAX_AXES: usize = 8;

/// Reads a header and leaves `data` at the elements.
///
/// # Errors
/// Not a `.npy`, cut, or an element type or layout that is not read, by name.
pub fn read(mut data: Box<dyn Read + Send>) -> Result<ArrayReader, String> {
    let mut start = [0; 8];
    read_exact(&mut data, &mut start)?;
    if start[..6] != *MAGIC {
        return Err("not a .npy array: it does not begin with \\x93NUMPY".into());
    }
    let length = match start[6] {
        1 => {
            let mut bytes = [0; 2];
            read_exact(&mut data, &mut bytes)?;
            usize::from(u16::from_le_bytes(bytes))
        }
        2 | 3 => {
            let mut bytes = [0; 4];
            read_exact(&mut data, &mut bytes)?;
            u32::from_le_bytes(bytes) as usize
        }
        version => return Err(format!(".npy version {version} is unknown, expected 1 to 3")),
    };
    if length > MAX_HEADER_BYTES {
        return Err(format!("a .npy header of {length} bytes exceeds the limit of {MAX_HEADER_BYTES}"));
    }
    let mut header = vec![0; length];
    read_exact(&mut data, &mut header)?;
    let text = String::from_utf8(header).map_err(|_| "the .npy header is not text".to_owned())?;
    let Header { layout, fortran, shape } = parse(&text).map_err(|why| format!(".npy header: {why}"))?;
    ArrayReader::new(layout, shape, fortran, data)
}

fn read_exact(data: &mut impl Read, bytes: &mut [u8]) -> Result<(), String> {
    data.read_exact(bytes).map_err(|e| match e.kind() {
        io::ErrorKind::UnexpectedEof => "cut within the .npy header".to_owned(),
        _ => e.to_string(),
    })
}

struct Header {
    layout: Layout,
    fortran: bool,
    shape: Vec<usize>,
}

/// Parses `{'descr': '<i8', 'fortran_order': False, 'shape': (58, 256), }`.
fn parse(text: &str) -> Result<Header, String> {
    let body = text.trim().strip_prefix('{').and_then(|t| t.strip_suffix('}')).ok_or("no dictionary")?;
    let (mut layout, mut fortran, mut shape) = (None, None, None);
    let mut rest = body.trim_start();
    while !rest.is_empty() {
        let (key, after) = quoted(rest).ok_or_else(|| format!("no key at {rest:?}"))?;
        let value = after.trim_start().strip_prefix(':').ok_or_else(|| format!("no value for {key}"))?;
        let value = value.trim_start();
        rest = match key {
            "descr" => {
                let Some((descr, after)) = quoted(value) else {
                    return Err("structured element types are not read".into());
                };
                layout = Some(element(descr)?);
                after
            }
            "fortran_order" => {
                let (word, after) = value.split_at(value.find([',', '}']).unwrap_or(value.len()));
                fortran = Some(match word.trim() {
                    "True" => true,
                    "False" => false,
                    other => return Err(format!("fortran_order is {other:?}, expected True or False")),
                });
                after
            }
            "shape" => {
                let inner = value.strip_prefix('(').ok_or("shape is no tuple")?;
                let (inner, after) = inner.split_once(')').ok_or("shape is no tuple")?;
                shape = Some(axes(inner)?);
                after
            }
            other => return Err(format!("key {other:?} is unknown")),
        };
        rest = rest.trim_start().trim_start_matches(',').trim_start();
    }
    match (layout, fortran, shape) {
        (Some(layout), Some(fortran), Some(shape)) => Ok(Header { layout, fortran, shape }),
        (layout, fortran, _) => Err(format!(
            "{} is missing",
            if layout.is_none() {
                "descr"
            } else if fortran.is_none() {
                "fortran_order"
            } else {
                "shape"
            }
        )),
    }
}

/// A quoted text and what follows it.
fn quoted(text: &str) -> Option<(&str, &str)> {
    let quote = text.chars().next().filter(|c| ['\'', '"'].contains(c))?;
    text[1..].split_once(quote)
}

fn axes(inner: &str) -> Result<Vec<usize>, String> {
    let parts = inner.split(',').map(str::trim).filter(|part| !part.is_empty());
    let axes: Result<Vec<usize>, String> =
        parts.map(|part| part.parse().map_err(|_| format!("{part:?} is no length of an axis"))).collect();
    let axes = axes?;
    match axes.len() {
        n if n > MAX_AXES => Err(format!("{n} axes exceed the limit of {MAX_AXES}")),
        _ => Ok(axes),
    }
}

fn element(descr: &str) -> Result<Layout, String> {
    let (order, kind) = descr.split_at_checked(1).unwrap_or(("", ""));
    let element = match kind {
        "u1" => Element::U8,
        "u2" => Element::U16,
        "u4" => Element::U32,
        "u8" => Element::U64,
        "i1" => Element::I8,
        "i2" => Element::I16,
        "i4" => Element::I32,
        "i8" => Element::I64,
        "f2" => Element::F16,
        "f4" => Element::F32,
        "f8" => Element::F64,
        _ => {
            return Err(format!(
                "element type {descr:?} is not read, only integers and floats up to 64 bits"
            ));
        }
    };
    match order {
        "<" | "|" | "=" => Ok(Layout { element, big_endian: false }),
        ">" => Ok(Layout { element, big_endian: true }),
        _ => Err(format!("byte order {order:?} is unknown")),
    }
}

/// Writes a header of version 1; the elements follow in row-major order, little-endian. `descr` is NumPy's name of the
/// element type, `<i8` for instance. Headers of up to three axes are 128 bytes long, whatever the lengths, so that one
/// can be corrected at the end.
///
/// # Errors
/// Those of `out`.
pub fn write_header(out: &mut impl Write, descr: &str, shape: &[usize]) -> io::Result<()> {
    let lengths: Vec<String> = shape.iter().map(|len| format!("{len},")).collect();
    let mut header =
        format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': ({}), }}", lengths.join(" "));
    // Magic, version, length and header fill whole blocks of 64 bytes, the last one being a new line.
    let used = MAGIC.len() + 4 + header.len() + 1;
    header.extend(std::iter::repeat_n(' ', used.next_multiple_of(64).max(128) - used));
    header.push('\n');
    out.write_all(MAGIC)?;
    out.write_all(&[1, 0])?;
    out.write_all(&(header.len() as u16).to_le_bytes())?;
    out.write_all(header.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::number::Number;

    fn read_all(bytes: Vec<u8>) -> Result<(Vec<usize>, Vec<Vec<Number>>), String> {
        let mut array = read(Box::new(io::Cursor::new(bytes)))?;
        let mut records = Vec::new();
        while let Some(record) = array.next_record()? {
            records.push(record.collect());
        }
        Ok((array.shape, records))
    }

    fn file(header: &str, data: &[u8]) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend([1, 0]);
        bytes.extend((header.len() as u16).to_le_bytes());
        bytes.extend(header.as_bytes());
        bytes.extend(data);
        bytes
    }

    #[test]
    fn what_is_written_is_read() {
        let mut bytes = Vec::new();
        write_header(&mut bytes, "<i8", &[2, 3]).unwrap();
        assert_eq!(bytes.len() % 64, 0);
        (0..6i64).for_each(|n| bytes.extend(n.to_le_bytes()));
        let (shape, records) = read_all(bytes).unwrap();
        assert_eq!(shape, [2, 3]);
        assert_eq!(records[1], [3, 4, 5].map(Number::Int));
    }

    #[test]
    fn fortran_order_is_turned_around() {
        let header = "{'descr': '|u1', 'fortran_order': True, 'shape': (2, 3, 2), }\n";
        // Element (i, j, k) holds 100 i + 10 j + k.
        let data: Vec<u8> = (0..2)
            .flat_map(|k| (0..3).flat_map(move |j| (0..2).map(move |i| 100 * i + 10 * j + k)))
            .collect();
        let (_, records) = read_all(file(header, &data)).unwrap();
        assert_eq!(records[1], [100, 101, 110, 111, 120, 121].map(Number::Int));
    }

    #[test]
    fn refusals_name_what_is_wrong() {
        let head = |descr: &str, order: &str, shape: &str| {
            file(&format!("{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}}}"), &[0; 16])
        };
        assert!(read_all(head("'<i4'", "False", "(2, 2)")).is_ok());
        for (bytes, expected) in [
            (head("'<c8'", "False", "(2,)"), "element type \"<c8\" is not read"),
            (head("'|O'", "False", "(2,)"), "element type \"|O\""),
            (head("[('a', '<i4')]", "False", "(2,)"), "structured"),
            (head("'?i4'", "False", "(2,)"), "byte order"),
            (head("'<i4'", "Maybe", "(2,)"), "fortran_order is \"Maybe\""),
            (head("'<i4'", "False", "(2, -1)"), "\"-1\" is no length"),
            (head("'<i4'", "False", "(1,1,1,1,1,1,1,1,1)"), "9 axes exceed"),
            (head("'<i4'", "False", "(99999999999, 0)"), "records without elements"),
            (head("'<i4'", "False", "(99999999999, 99999999999)"), "exceeds the limit"),
            (head("'<i8'", "False", "(99999999999, 99999999)"), "does not fit any memory"),
            (head("'<i4'", "True", "(999999999, 2)"), "in Fortran order exceed"),
            (head("'<i4'", "False", "(2, 3)"), "cut after 4 of 12 bytes"),
            (head("'<i4'", "True", "(2, 3)"), "cut after 16 of 24 bytes"),
            (head("'<i4'", "False", "(1, 3)"), "data follow the 1 records"),
            (file("{'shape': (1,), 'fortran_order': False}", &[]), "descr is missing"),
            (file("nonsense", &[]), "no dictionary"),
            (MAGIC.to_vec(), "cut within the .npy header"),
            (b"\x93NUMPY\x07\0\0\0".to_vec(), "version 7 is unknown"),
            (b"\x93NUMPY\x02\0\xff\xff\xff\xff".to_vec(), "exceeds the limit"),
            (b"PK\x03\x04....".to_vec(), "not a .npy"),
        ] {
            let message = read_all(bytes).unwrap_err();
            assert!(message.contains(expected), "{message:?} should contain {expected:?}");
        }
    }
}
