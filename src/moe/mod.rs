//! The MoE layer: router -> dispatch -> experts -> combine, on the rows a rank owns.
//!
//! [`layer`] composes the steps, [`dispatch`] is the index arithmetic between them (pure), [`load`] counts.

pub mod dispatch;
pub mod layer;
pub mod load;
pub mod router;
