//! The HTTP surface as a client meets it: a real server on a real socket, an engine with the scripted model.

#[allow(dead_code, reason = "the tests of tests/cli use the rest")]
mod client;
mod harness;
#[path = "../support/numbers.rs"]
mod numbers;
#[path = "../support/patience.rs"]
mod patience;

mod auth;
mod chat;
mod completions;
mod control;
mod dashboard;
mod disconnects;
mod errors;
mod experts;
mod framing;
mod generation;
mod limits;
mod metrics;
mod openapi;
mod pressure;
mod routes;
mod shutdown;
mod structured;
mod tokenize;
