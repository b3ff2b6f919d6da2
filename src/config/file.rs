//! The TOML file of `--config`: the keys of [`RawOptions`] at its top level.

use std::path::Path;

use super::flags::RawOptions;
use crate::error::{Error, Result};

/// Reads the file.
///
/// # Errors
/// [`Error::Io`] when it cannot be read; [`Error::Config`] naming the file, the line and the key otherwise, with the
/// allowed keys for an unknown one.
pub fn read(path: &Path) -> Result<RawOptions> {
    let text = std::fs::read_to_string(path).map_err(|e| Error::io(path, e))?;
    parse(&text, &path.display().to_string())
}

/// Reads the text of a file called `name`.
///
/// # Errors
/// See [`read`].
pub fn parse(text: &str, name: &str) -> Result<RawOptions> {
    toml::from_str(text).map_err(|error| {
        let place = match error.span() {
            Some(span) => format!("{name}:{}", line_of(text, span.start)),
            None => name.to_owned(),
        };
        Error::config(place, with_suggestion(error.message()))
    })
}

/// Least similarity (Jaro-Winkler) of a key that is suggested.
const SIMILAR: f64 = 0.8;

/// The parser's message; one about an unknown key, "unknown field `x`, expected one of `a`, `b`", or value also says
/// which known one was probably meant.
fn with_suggestion(message: &str) -> String {
    let mut quoted = message.split('`').skip(1).step_by(2);
    let unknown = quoted.next().filter(|_| message.starts_with("unknown "));
    let Some(unknown) = unknown else { return message.to_owned() };
    let likeness = |known: &str| strsim::jaro_winkler(&unknown.replace('_', "-"), &known.replace('_', "-"));
    match quoted.max_by(|a, b| likeness(a).total_cmp(&likeness(b))) {
        Some(known) if likeness(known) >= SIMILAR => format!("{message} (did you mean `{known}`?)"),
        _ => message.to_owned(),
    }
}

/// Number of the line, from 1, that holds a byte.
fn line_of(text: &str, byte: usize) -> usize {
    1 + text.bytes().take(byte).filter(|&b| b == b'\n').count()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::flags::{DeviceChoice, ExpertDetailChoice, RawMetrics};
    use crate::config::size::ByteSize;

    fn refused(text: &str) -> String {
        parse(text, "yard.toml").unwrap_err().to_string()
    }

    #[test]
    fn keys_are_the_flags() {
        let options = parse(
            "device = \"cpu\"\nexpert-parallel-size = 4\nkv-cache-memory = \"1GiB\"\nno-prefix-caching = true\n",
            "yard.toml",
        );
        let expected = RawOptions {
            device: Some(DeviceChoice::Cpu),
            expert_parallel_size: Some(4),
            kv_cache_memory: Some(ByteSize(1 << 30)),
            no_prefix_caching: Some(true),
            ..RawOptions::default()
        };
        assert_eq!(options.unwrap(), expected);
        for (text, keys) in [("api-key = \"a,b\"", &["a,b"][..]), ("api-key = [\"a\", \"b\"]", &["a", "b"])] {
            let given = parse(text, "").unwrap().api_key.unwrap();
            assert!(given.iter().map(|key| key.reveal()).eq(keys.iter().copied()), "{text}");
        }
        assert_eq!(parse("kv-cache-memory = 4096", "").unwrap().kv_cache_memory, Some(ByteSize(4096)));
        assert_eq!(parse("", "").unwrap(), RawOptions::default());
    }

    #[test]
    fn unknown_keys_are_refused_with_the_known_ones() {
        for key in ["api_key", "eplb-window", "save-load", "tensor_parallel_size"] {
            let error = refused(&format!("port = 1\n{key} = \"x\"\n"));
            assert!(error.starts_with("yard.toml:2: "), "{error}");
            assert!(error.contains(&format!("unknown field `{key}`")), "{error}");
            assert!(error.contains("`tensor-parallel-size`") && error.contains("`drain-timeout`"), "{error}");
        }
    }

    #[test]
    fn a_misspelt_key_or_value_is_recognised() {
        for (text, meant) in [
            ("prot = 1", "port"),
            ("tensor_parallel_size = 2", "tensor-parallel-size"),
            ("expert-paralel-size = 2", "expert-parallel-size"),
            ("[metrics]\nexpert-detail = \"rank\"", "expert_detail"),
            ("[metrics]\nexpert_detail = \"layer-rank\"", "layer_rank"),
            ("[metric]\n", "metrics"),
            ("dtype = \"b16\"", "bf16"),
        ] {
            let error = refused(text);
            assert!(error.ends_with(&format!("(did you mean `{meant}`?)")), "{text}: {error}");
        }
        assert!(!refused("colour = 1").contains("did you mean"));
    }

    #[test]
    fn metrics_have_a_table_of_their_own() {
        let options =
            parse("port = 1\n[metrics]\nexpert_detail = \"layer_rank\"\nmax_series = 500\n", "").unwrap();
        let expected =
            RawMetrics { expert_detail: Some(ExpertDetailChoice::LayerRank), max_series: Some(500) };
        assert_eq!(options.metrics, expected);
        assert!(
            refused("port = 1\n[metrics]\ndetail = 1\n").starts_with("yard.toml:3: unknown field `detail`")
        );
    }

    #[test]
    fn bad_values_name_the_line() {
        assert!(refused("\n\nport = \"eighty\"").contains("yard.toml:3: invalid type: string \"eighty\""));
        assert!(refused("port = 99999").contains("99999"));
        assert!(
            refused("dtype = \"fp8\"")
                .contains("unknown variant `fp8`, expected one of `auto`, `f32`, `bf16`")
        );
        assert!(refused("kv-cache-memory = \"lots\"").contains("expected bytes such as 4GiB"));
        assert!(refused("port = ").starts_with("yard.toml:1: "));
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = read(Path::new("no/such.toml")).unwrap_err().to_string();
        assert!(error.starts_with("no/such.toml: "), "{error}");
    }

    #[test]
    fn every_shipped_file_is_understood() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs");
        let mut found = 0;
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|e| e == "toml") {
                let options = read(&path).unwrap();
                assert_ne!(options, RawOptions::default(), "{} says nothing", path.display());
                found += 1;
            }
        }
        assert!(found >= 2, "{found} files in configs/");
    }
}
