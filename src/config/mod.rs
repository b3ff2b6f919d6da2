//! What the user wrote ([`RawOptions`], from flags and a TOML file) and what the program runs on ([`Options`], with
//! every default filled in and every combination checked). Pure functions but for [`host_memory`] and reading the file.

pub mod flags;
pub mod secret;
pub mod size;
pub mod file;
pub mod parallel;
pub mod host_memory;
pub mod memory;
pub mod resolve;

pub use flags::RawOptions;
pub use parallel::Parallel;
pub use resolve::Options;
