//! The only forward pass.
