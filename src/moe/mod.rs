//! The MoE layer.
