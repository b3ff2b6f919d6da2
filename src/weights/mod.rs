//! Checkpoints in Hugging Face layout: [`Checkpoint`] opens the files, [`validate`] compares them with the model,
//! [`WeightReader`] copies slices out, dequantised; [`check_finite`] and [`check_manifest`] look at every byte. Nothing here knows a device.

mod checkpoint;
mod checksum;
mod collapse;
mod dummy;
mod finder;
mod finite;
mod inventory;
mod mmap;
pub mod names;
mod quant;
mod reader;
mod safetensors;
pub mod shard;
mod source;
mod stored;
mod validate;

pub use checkpoint::{
    CHAT_TEMPLATE, CONFIG, Checkpoint, GENERATION_CONFIG, TOKENIZER, TOKENIZER_CONFIG, TensorRef,
};
pub use checksum::{MANIFEST, check_manifest};
pub use finite::check_finite;
pub use inventory::{Part, RoleShape, parameters, role_shape};
pub use names::{ExpertNames, MlpNames, Role, TensorNames};
pub use reader::{MlpKind, Progress, WeightReader};
pub use safetensors::{Header, read_header};
pub use source::{EmbeddedFile, Source};
pub use validate::{stored_bytes, validate};
