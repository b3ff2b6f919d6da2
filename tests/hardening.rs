//! Where each known way to break a model server is tested: published weaknesses of others, and faults that must be survived.
//! The tables are kept true: a test that is named must exist where they say.

use std::fs;
use std::path::Path;

/// File and function of each.
type Tests = &'static [(&'static str, &'static str)];

/// A weakness of another server, what follows for this one, and the tests of that.
struct Weakness {
    ids: &'static [&'static str],
    rule: &'static str,
    tests: Tests,
}

const WEAKNESSES: &[Weakness] = &[
    Weakness {
        ids: &["CVE-2026-3059", "CVE-2026-3060", "CVE-2026-7301"],
        rule: "no objects are unpickled from sockets: ranks share memory, and nothing but HTTP listens",
        tests: &[("tests/cli/limits.rs", "cve_2025_30202_only_the_asked_address_listens")],
    },
    Weakness {
        ids: &["CVE-2024-50050"],
        rule: "no format that describes code is read, from sockets or files",
        tests: &[
            ("tests/cli/limits.rs", "cve_2025_30202_only_the_asked_address_listens"),
            ("tests/cli/faults.rs", "cve_2026_22807_a_config_is_data"),
        ],
    },
    Weakness {
        ids: &["CVE-2025-30202"],
        rule: "only the address that was asked for listens, and a slow reader blocks nobody",
        tests: &[
            ("tests/cli/limits.rs", "cve_2025_30202_only_the_asked_address_listens"),
            ("tests/http/disconnects.rs", "a_client_that_does_not_read_is_dropped_and_holds_up_nobody"),
        ],
    },
    Weakness {
        ids: &["CVE-2025-62164"],
        rule: "no tensors from clients",
        tests: &[("tests/http/errors.rs", "cve_2025_62164_no_tensors_are_taken")],
    },
    Weakness {
        ids: &["CVE-2026-22807"],
        rule: "a config is data; architectures that are not known are refused",
        tests: &[("tests/cli/faults.rs", "cve_2026_22807_a_config_is_data")],
    },
    Weakness {
        ids: &["CVE-2026-53923"],
        rule: "sizes of a checkpoint are multiplied with care",
        tests: &[("tests/checkpoints/faults.rs", "a_config_with_absurd_sizes_is_refused_without_overflow")],
    },
    Weakness {
        ids: &["CVE-2026-33298", "CVE-2026-27940"],
        rule: "the arithmetic of tensor headers agrees with a reference that cannot overflow",
        tests: &[
            ("src/weights/safetensors/tests.rs", "header_arithmetic_agrees_with_the_reference"),
            ("src/weights/safetensors/tests.rs", "offsets_at_the_end_of_the_number_range_are_refused"),
            ("tests/fuzz.rs", "safetensors_headers"),
        ],
    },
    Weakness {
        ids: &["CVE-2026-21869"],
        rule: "every number of a request has a type and a range",
        tests: &[
            ("tests/http/errors.rs", "cve_2026_21869_every_number_has_a_range"),
            ("tests/http/errors.rs", "refusals_name_their_field"),
        ],
    },
    Weakness {
        ids: &["CVE-2025-48956"],
        rule: "headers are bounded before they are kept",
        tests: &[("tests/http/limits.rs", "cve_2025_48956_huge_headers_are_431")],
    },
    Weakness {
        ids: &["CVE-2025-59425"],
        rule: "keys are compared in constant time",
        tests: &[("tests/http/auth.rs", "cve_2025_59425_keys_guard_every_route_but_the_health_ones")],
    },
    Weakness {
        ids: &["CVE-2025-48944"],
        rule: "grammars and patterns are compiled within limits, and a bad one is the client's error",
        tests: &[("tests/http/structured.rs", "cve_2025_48944_bad_grammars_are_400_and_hurt_nobody")],
    },
    Weakness {
        ids: &[
            "CVE-2025-23319",
            "CVE-2025-23320",
            "CVE-2025-23334",
            "CVE-2025-23310",
            "CVE-2025-23311",
            "CVE-2025-33201",
        ],
        rule: "errors tell nothing of the inside, and no size from the wire is trusted",
        tests: &[
            ("src/server/error.rs", "every_error_has_its_status_type_and_param"),
            ("src/server/routes.rs", "a_panic_is_a_500_that_keeps_its_text_to_itself"),
            ("tests/http/limits.rs", "an_announced_body_over_the_limit_is_413_before_it_is_sent"),
            ("tests/http/framing.rs", "malformed_chunks_are_400"),
        ],
    },
];

/// Faults, numbered as the project's fault matrix has them, and their tests.
const FAULTS: &[(u32, &str, Tests)] = &[
    (
        7,
        "unknown keys and architectures, impossible degrees",
        &[
            ("tests/cli/faults.rs", "flags_and_keys_that_do_not_exist_are_refused_by_name"),
            ("tests/cli/faults.rs", "an_inconsistent_config_names_key_limit_and_value"),
            ("tests/cli/faults.rs", "degrees_that_do_not_divide_name_the_nearest"),
        ],
    ),
    (
        8,
        "a port in use, a missing folder, a full disk",
        &[
            ("tests/cli/faults.rs", "a_taken_port_and_a_missing_folder_are_named"),
            ("tests/cli/serve.rs", "a_trace_that_finds_the_disk_full_stops_and_serving_goes_on"),
        ],
    ),
    (
        9,
        "headers and bodies that come slowly",
        &[
            ("tests/http/limits.rs", "half_sent_headers_hold_up_nobody"),
            ("tests/http/limits.rs", "half_sent_headers_are_cut_off"),
            ("tests/http/limits.rs", "a_body_that_does_not_come_is_408"),
        ],
    ),
    (
        10,
        "bodies that are too large, chunked without end, or of doubtful length",
        &[
            ("tests/http/limits.rs", "an_announced_body_over_the_limit_is_413_before_it_is_sent"),
            ("tests/http/limits.rs", "a_chunked_body_is_counted_while_it_comes"),
            ("tests/http/framing.rs", "a_length_beside_chunks_is_400_and_the_connection_closes"),
            ("tests/http/framing.rs", "other_doubts_about_the_end_of_a_body_are_refused"),
        ],
    ),
    (11, "absurd JSON", &[("tests/http/errors.rs", "bodies_that_are_no_json_object_are_refused_quickly")]),
    (
        12,
        "prompts of millions of characters; the context to the token",
        &[("tests/http/errors.rs", "huge_prompts_hold_up_nobody_and_the_context_ends_exactly")],
    ),
    (13, "more connections than open files", &[("tests/cli/limits.rs", "open_files_run_out_and_come_back")]),
    (
        14,
        "a client that does not read",
        &[("tests/http/disconnects.rs", "a_client_that_does_not_read_is_dropped_and_holds_up_nobody")],
    ),
    (
        15,
        "clients that leave, at any time and with many choices",
        &[
            ("tests/http/disconnects.rs", "a_client_that_leaves_is_aborted"),
            ("tests/http/disconnects.rs", "a_client_that_leaves_the_queue_is_forgotten"),
            ("tests/http/pressure.rs", "who_leaves_with_many_choices_frees_all_of_them"),
        ],
    ),
    (
        16,
        "random connects and aborts",
        &[("tests/http/pressure.rs", "a_soak_of_random_clients_leaves_nothing_behind")],
    ),
    (
        17,
        "a full queue",
        &[
            ("tests/http/errors.rs", "a_full_queue_is_429_with_a_time_to_retry"),
            ("tests/http/pressure.rs", "a_queue_full_of_tokens_is_429"),
        ],
    ),
    (
        18,
        "too few KV blocks for the batch",
        &[
            ("tests/http/pressure.rs", "concurrent_answers_are_those_of_a_quiet_server"),
            ("tests/engine_model.rs", "a_preemption_leaves_tokens_and_bits"),
        ],
    ),
    (
        19,
        "a request larger than the KV cache",
        &[("tests/engine/refusals.rs", "what_can_never_run_is_refused_with_its_numbers")],
    ),
    (
        20,
        "SIGTERM, idle and busy, once and twice",
        &[
            ("tests/http/shutdown.rs", "running_requests_finish_and_new_ones_are_told"),
            ("tests/http/shutdown.rs", "after_the_drain_time_streams_end_with_an_error"),
            ("tests/cli/serve.rs", "a_second_signal_ends_running_answers_and_the_server_at_once"),
        ],
    ),
    (
        21,
        "SIGINT and SIGHUP",
        &[("tests/http/shutdown.rs", "the_first_signal_drains_the_second_aborts_and_a_hangup_does_nothing")],
    ),
    (
        22,
        "a panic in one request",
        &[
            ("src/server/sequences.rs", "a_panicking_task_is_a_500_while_others_go_on"),
            ("src/server/routes.rs", "a_panic_is_a_500_that_keeps_its_text_to_itself"),
        ],
    ),
    (
        23,
        "a panic in the engine, a lost rank",
        &[
            ("tests/http/shutdown.rs", "a_dead_engine_is_reported_everywhere"),
            ("tests/http/shutdown.rs", "a_dead_engine_ends_the_server"),
            ("tests/cli/limits.rs", "a_lost_rank_is_503_an_error_chunk_and_exit_code_1"),
        ],
    ),
    (
        34,
        "all tokens to one expert, one token, the largest batch",
        &[
            ("tests/extremes.rs", "all_tokens_on_the_experts_that_win_every_tie"),
            ("tests/extremes.rs", "all_tokens_on_the_experts_of_one_group"),
        ],
    ),
    (
        36,
        "many scrapes, and scrapes while it shuts down",
        &[
            ("tests/http/metrics.rs", "a_hundred_scrapes_at_once_disturb_nobody"),
            ("tests/http/metrics.rs", "the_page_is_whole_while_the_server_shuts_down"),
        ],
    ),
    (
        37,
        "a log that nobody reads",
        &[("tests/cli/log.rs", "a_log_that_nobody_reads_costs_lines_and_no_time")],
    ),
    (38, "prompts and keys in the log", &[("tests/cli/log.rs", "neither_prompts_nor_keys_are_logged")]),
];

fn assert_exists(what: &str, tests: Tests) {
    assert!(!tests.is_empty(), "{what}: no test");
    for (file, name) in tests {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(file);
        let text = fs::read_to_string(&path).unwrap_or_else(|why| panic!("{what}: {file}: {why}"));
        let function = format!("fn {name}(");
        let line = text.lines().position(|line| line.contains(&function));
        let line = line.unwrap_or_else(|| panic!("{what}: {file} has no test {name}"));
        // proptest's arguments may be on lines of their own; its attribute stands before the function like any other.
        let before: Vec<&str> = text.lines().take(line).collect();
        assert!(
            before.iter().rev().take(4).any(|line| line.contains("test]")),
            "{what}: {name} of {file} is no test"
        );
    }
}

#[test]
fn every_weakness_of_others_has_its_test() {
    for Weakness { ids, rule, tests } in WEAKNESSES {
        assert!(ids.iter().all(|id| id.starts_with("CVE-")) && rule.len() > 10, "{ids:?}");
        assert_exists(&ids.join(", "), tests);
    }
}

#[test]
fn every_fault_has_its_test() {
    for (row, fault, tests) in FAULTS {
        assert_exists(&format!("fault {row}, {fault}"), tests);
    }
    let rows: Vec<u32> = FAULTS.iter().map(|(row, ..)| *row).collect();
    let expected: Vec<u32> = (7..=23).chain([34, 36, 37, 38]).collect();
    assert_eq!(rows, expected);
}
