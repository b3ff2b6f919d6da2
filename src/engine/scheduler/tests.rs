//! The scheduler against the scripted model, without threads or tensors: whatever the arrivals and limits, every request
//! gets the tokens it gets alone.

mod company;
mod order;
mod prefixes;
mod prompts;
mod requests;
mod world;
