//! The binary as a user meets it: exit codes, messages, files, and an endpoint on a real socket.

#[path = "../http/client.rs"]
#[allow(dead_code, reason = "the tests of tests/http use the rest")]
mod client;
#[path = "../support/mod.rs"]
mod support;

mod dump;
mod frozen;
mod process;

mod bench;
mod faults;
mod generate;
mod limits;
mod log;
mod moving;
mod serve;
mod verify;

use support::patience;
