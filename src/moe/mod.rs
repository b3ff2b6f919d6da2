//! The MoE layer: router -> dispatch -> experts -> combine, on the rows a rank owns.
//!
//! [`layer`] composes the steps, [`dispatch`] is the index arithmetic between them (pure), `padded` does without it where devices do
//! it, [`load`] counts, [`migrate`] moves weights between ranks, and [`in_force`] tells where they are.

pub mod dispatch;
pub mod in_force;
pub mod layer;
pub mod load;
pub mod migrate;
mod padded;
pub mod router;
