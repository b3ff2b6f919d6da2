use super::*;
use ::safetensors::SafeTensors;
use proptest::prelude::*;

/// A file with this header and so many bytes of data.
fn file(header: &str, data: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.resize(bytes.len() + data, 0);
    bytes
}

fn read(bytes: &[u8]) -> (Option<Header>, Vec<String>) {
    let mut problems = Problems::new("checkpoint");
    let header = read_header("f", bytes, &mut problems);
    (header, problems.list.iter().map(ToString::to_string).collect())
}

/// The file is refused with exactly these messages.
#[track_caller]
fn refused(bytes: &[u8], expected: &[&str]) {
    assert_eq!(read(bytes).1, expected);
}

const TWO: &str = r#"{"__metadata__":{"format":"pt"},
    "b":{"dtype":"BF16","shape":[2,3],"data_offsets":[8,20]},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}} "#;

#[test]
fn a_sound_file_is_read() {
    let bytes = file(TWO, 20);
    let (header, problems) = read(&bytes);
    assert!(problems.is_empty(), "{problems:?}");
    let start = bytes.len() - 20;
    let entry = |name: &str, dtype, shape: &[usize], range: Range<usize>| Entry {
        name: name.to_owned(),
        dtype,
        shape: shape.to_vec(),
        bytes: start + range.start..start + range.end,
    };
    let expected = [entry("a", Dtype::F32, &[2], 0..8), entry("b", Dtype::BF16, &[2, 3], 8..20)];
    assert_eq!(header.unwrap().entries, expected);
}

#[test]
fn truncation_is_refused_wherever_it_is() {
    let bytes = file(TWO, 20);
    let header = bytes.len() - 20;
    refused(
        &[],
        &["f: expected 8 bytes of header length at offset 0, found a file of 0 bytes, cut at offset 0"],
    );
    refused(
        &bytes[..7],
        &["f: expected 8 bytes of header length at offset 0, found a file of 7 bytes, cut at offset 7"],
    );
    for len in [8, 9, header - 1] {
        refused(
            &bytes[..len],
            &[&format!(
                "f: expected a header of {} bytes at offset 8, so a file of at least {header} bytes, \
                 found a file of {len} bytes, cut inside the header",
                header - 8
            )],
        );
    }
    refused(
        &bytes[..header + 19],
        &[&format!(
            "f: b: expected bytes {}..{} of a file of {} bytes (header and all tensors), found a file of {} bytes",
            header + 8,
            header + 20,
            header + 20,
            header + 19
        )],
    );
    refused(
        &bytes[..header + 3],
        &[&format!(
            "f: a: expected bytes {header}..{} of a file of {} bytes (header and all tensors), \
             found a file of {} bytes; also beyond its end: b",
            header + 8,
            header + 20,
            header + 3
        )],
    );
}

#[test]
fn an_absurd_header_length_is_refused_unread() {
    for length in [100_000_000, 1 << 63, u64::MAX] {
        let bytes = [&length.to_le_bytes()[..], b"{}"].concat();
        refused(
            &bytes,
            &[&format!("f: expected a header length below 100000000 bytes at offset 0, found {length}")],
        );
    }
}

#[test]
fn a_header_that_is_not_the_right_json_is_refused() {
    let start = |json: &str| {
        format!("f: expected a JSON header of tensor entries in bytes 8..{}, found ", 8 + json.len())
    };
    for (json, found) in [
        ("", "EOF while parsing a value"),
        ("[]", "invalid type: sequence, expected an object with at most 400000 tensors"),
        ("{} x", "trailing characters"),
        (r#"{"a":{"dtype":"F32","shape":[1]}}"#, "tensor \"a\": missing field `data_offsets`"),
        (
            r#"{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}"#,
            "tensor \"a\": invalid value: integer `-1`, expected u64",
        ),
        (
            r#"{"a":{"dtype":"F32","shape":[1,1,1,1,1,1,1,1,1],"data_offsets":[0,4]}}"#,
            "tensor \"a\": invalid length 9, expected a shape of at most 8 dimensions",
        ),
    ] {
        let (header, problems) = read(&file(json, 0));
        assert!(header.is_none());
        let found = format!("{}{found}", start(json));
        assert!(problems.len() == 1 && problems[0].starts_with(&found), "{problems:?}\nwanted {found}");
    }
    let mut bytes = file(TWO, 20);
    bytes[40] = 0xff;
    let problems = read(&bytes).1.concat();
    assert!(
        problems.contains("bytes that are not UTF-8: invalid utf-8 sequence of 1 bytes from index 32"),
        "{problems}"
    );
}

#[test]
fn endless_names_and_types_are_not_repeated_in_messages() {
    let name = "n".repeat(5000);
    let json = format!(r#"{{"{name}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}}}"#);
    let problems = read(&file(&json, 0)).1;
    assert!(problems[0].contains("expected a name of at most 1024 bytes, found 5000"), "{problems:?}");
    assert!(problems[0].len() < 300, "{problems:?}");
    let json = format!(r#"{{"a":{{"dtype":"{name}","shape":[0],"data_offsets":[0,0]}}}}"#);
    let problems = read(&file(&json, 0)).1;
    assert!(
        problems[0].starts_with("f: a: expected a dtype of the safetensors format, found \"nnnn"),
        "{problems:?}"
    );
    assert!(problems[0].len() < 300, "{problems:?}");
}

#[test]
fn nesting_does_not_reach_the_stack() {
    let json = format!("{{\"a\":{}", "[".repeat(1 << 20));
    assert!(read(&file(&json, 0)).0.is_none());
}

#[test]
fn all_faults_of_a_header_are_listed() {
    let json = concat!(
        r#"{"type":{"dtype":"F33","shape":[1],"data_offsets":[0,4]},"#,
        r#""order":{"dtype":"F32","shape":[1],"data_offsets":[4,0]},"#,
        r#""huge":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,4]},"#,
        r#""size":{"dtype":"F32","shape":[3],"data_offsets":[0,4]},"#,
        r#""nibble":{"dtype":"F4","shape":[3],"data_offsets":[0,2]},"#,
        r#""twice":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"#,
        r#""twice":{"dtype":"F32","shape":[1],"data_offsets":[4,8]},"#,
        r#""inside":{"dtype":"F32","shape":[1],"data_offsets":[6,10]},"#,
        r#""later":{"dtype":"F32","shape":[1],"data_offsets":[14,18]}}"#
    );
    let start = 8 + json.len();
    refused(
        &file(json, 20),
        &[
            "f: twice: expected one entry of this name in the header, found two or more",
            "f: type: expected a dtype of the safetensors format, found \"F33\"",
            "f: order: expected data_offsets in ascending order, found data_offsets 4..0",
            "f: huge: expected a shape whose size in bits fits 64 bits, found F32 [4294967296, 4294967296], whose size \
             overflows",
            "f: size: expected 12 bytes for F32 [3], found data_offsets 0..4 (4 bytes)",
            "f: nibble: expected a whole number of bytes, found 12 bits for F4 [3]",
            "f: inside: expected data_offsets to start at 8, where twice ends, found 6..10: an overlap of 2 bytes",
            "f: later: expected data_offsets to start at 10, where inside ends, found 14..18: a gap of 4 bytes",
            &format!(
                "f: expected a file of {} bytes, where later ends, found {} bytes",
                start + 18,
                start + 20
            ),
        ],
    );
    let (header, _) = read(&file(json, 20));
    let header = header.unwrap();
    assert_eq!(header.entries.iter().map(|e| e.name.as_str()).collect::<Vec<_>>(), ["inside", "later"]);
    assert!(header.refused.contains(&"twice".to_owned()));
}

#[test]
fn offsets_at_the_end_of_the_number_range_are_refused() {
    let max = u64::MAX;
    let json = format!(r#"{{"a":{{"dtype":"U8","shape":[2],"data_offsets":[{},{max}]}}}}"#, max - 2);
    let problems = read(&file(&json, 4)).1;
    assert_eq!(problems.len(), 2, "{problems:?}");
    assert!(problems[0].contains("f: a: expected bytes 18446744073709551"), "{problems:?}");
}

proptest! {
    #[test]
    fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..256)) {
        let (header, problems) = read(&bytes);
        prop_assert!(header.is_some() || !problems.is_empty());
    }

    /// Arbitrary numbers in a well-formed header: no panic, and what is accepted the reference implementation accepts.
    #[test]
    fn header_arithmetic_agrees_with_the_reference(
        entries in proptest::collection::vec(
            (0..4usize, proptest::collection::vec(number(), 0..4), number(), number()), 0..4),
        data in 0..64usize,
    ) {
        let entries: Vec<String> = entries
            .iter()
            .enumerate()
            .map(|(i, (dtype, shape, start, end))| {
                let dtype = ["F32", "BF16", "F4", "I64"][*dtype];
                format!(r#""t{i}":{{"dtype":"{dtype}","shape":{shape:?},"data_offsets":[{start},{end}]}}"#)
            })
            .collect();
        compare(&file(&format!("{{{}}}", entries.join(",")), data))?;
    }

    /// Sound files, and sound files with one number changed.
    #[test]
    fn sound_and_almost_sound_files_agree_with_the_reference(
        shapes in proptest::collection::vec(proptest::collection::vec(0..5u64, 0..4), 0..5),
        change in proptest::option::of((0..5usize, 0..8u64)),
        data_change in 0..3usize,
    ) {
        let mut start = 0;
        let mut entries = Vec::new();
        for (i, shape) in shapes.iter().enumerate() {
            let mut end = start + 4 * shape.iter().product::<u64>();
            let next = end;
            if let Some((at, to)) = change && at == i {
                end = to;
            }
            entries.push(format!(r#""t{i}":{{"dtype":"F32","shape":{shape:?},"data_offsets":[{start},{end}]}}"#));
            start = next;
        }
        compare(&file(&format!("{{{}}}", entries.join(",")), (start as usize + data_change).saturating_sub(1)))?;
    }
}

/// Small numbers mostly, and the edges of the range.
fn number() -> impl Strategy<Value = u64> {
    prop_oneof![0..24u64, Just(u64::MAX), Just(u64::MAX / 2 + 1), Just(1 << 32), any::<u64>()]
}

/// This reader and the `safetensors` crate accept the same files, with the same contents.
fn compare(bytes: &[u8]) -> Result<(), TestCaseError> {
    let (header, problems) = read(bytes);
    let reference = SafeTensors::deserialize(bytes);
    prop_assert_eq!(problems.is_empty(), reference.is_ok(), "{:?} {:?}", problems, reference.err());
    let Ok(reference) = reference else { return Ok(()) };
    let header = header.unwrap();
    prop_assert_eq!(header.entries.len(), reference.len());
    for entry in header.entries {
        let tensor = reference.tensor(&entry.name).unwrap();
        prop_assert_eq!(tensor.dtype(), entry.dtype);
        prop_assert_eq!(tensor.shape(), &entry.shape[..]);
        prop_assert_eq!(tensor.data(), &bytes[entry.bytes]);
    }
    Ok(())
}
