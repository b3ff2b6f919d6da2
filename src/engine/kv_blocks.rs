//! kv_blocks
