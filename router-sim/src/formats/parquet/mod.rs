//! Parquet files with lists of expert ids, a row per token and layer or per token:
//!
//! | column | holds |
//! | --- | --- |
//! | `indices`, `topk_ids`, `expert_ids`, `topk` or `routed_experts` | a token's choices in a layer, or a list of them per layer |
//! | `scores`, `topk_weights` or `weights` (optional) | router weights, of the same shape |
//! | `layer` or `layer_id` (optional) | the layer of a row; without it, rows are of one layer |
//! | `request_id`, `req_id` or `sequence_id` (optional) | a number or a text |
//! | `token_idx` or `position` (optional) | the token of the request; counted per request and layer when missing |
//!
//! Built with the feature `parquet` only: the crate behind it is large.

#[cfg(not(feature = "parquet"))]
mod disabled;
#[cfg(feature = "parquet")]
mod enabled;

#[cfg(not(feature = "parquet"))]
pub use disabled::open;
#[cfg(feature = "parquet")]
pub use enabled::open;
