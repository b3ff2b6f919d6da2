//! The CPU backend.

pub(in crate::backend) mod memory;
