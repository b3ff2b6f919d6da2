//! The model in the binary: a first run needs no download.

use crate::weights::EmbeddedFile;

/// Name under which the embedded model is served.
pub const NAME: &str = "demo-mixtral";

macro_rules! file {
    ($name:literal) => {
        ($name, include_bytes!(concat!("../../models/demo-mixtral/", $name)) as &[u8])
    };
}

/// A checkpoint folder as data.
pub static FILES: &[EmbeddedFile] = &[
    file!("config.json"),
    file!("generation_config.json"),
    file!("model.safetensors"),
    file!("tokenizer.json"),
    file!("tokenizer_config.json"),
    file!("chat_template.jinja"),
];
