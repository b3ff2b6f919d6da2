use super::*;
use crate::model::families;
use crate::spec::Score;

/// 8 experts, 32768 positions.
fn spec() -> ModelSpec {
    families::resolve(include_bytes!("../../../tests/fixtures/mixtral/config.json")).unwrap().spec
}

fn resolve(raw: RawOptions) -> Result<Options> {
    Options::resolve(raw, &spec(), 16)
}

fn refusal(raw: RawOptions) -> String {
    resolve(raw).unwrap_err().to_string()
}

#[test]
fn every_default() {
    let expected = Options {
        server: ServerOptions {
            host: "127.0.0.1".to_owned(),
            port: 8000,
            api_keys: Vec::new(),
            trust_chat_template: false,
            served_model_name: None,
            generation_config: GenerationConfig::Checkpoint,
            drain_timeout: Duration::from_secs(30),
            metrics: SeriesOptions { expert_detail: None, max_series: 20_000 },
        },
        model: ModelOptions {
            device: DeviceChoice::Auto,
            dtype: DType::Bf16,
            quantize: None,
            threads: 16,
            comm: CommChoice::Auto,
            comm_timeout: Duration::from_secs(60),
            check_weights: false,
        },
        parallel: Parallel::SINGLE,
        scheduler: SchedulerOptions {
            max_model_len: None,
            max_num_seqs: 64,
            max_num_batched_tokens: 2048,
            prefill_chunk_size: 512,
            policy: SchedulingPolicy::Arrival,
            max_queued_requests: 1024,
            max_queued_tokens: 1 << 20,
            step_timeout: Duration::from_secs(10),
        },
        cache: CacheOptions { block_size: 32, memory: None, prefix_caching: true },
        experts: ExpertOptions {
            slots_per_rank: 8,
            split: Split::Exact,
            staging_slots: 0,
            move_bandwidth: None,
            rebalance: Some(Mode::Off),
            rebalance_policy: PolicyName::BEST,
            rebalance_window: 256,
            save_placement: None,
            placement: None,
            record_routing: None,
        },
    };
    assert_eq!(resolve(RawOptions::default()).unwrap(), expected);
}

#[test]
fn values_given_are_taken() {
    let options = resolve(RawOptions {
        dtype: Some(DtypeChoice::F32),
        device: Some(DeviceChoice::Cpu),
        quantize: Some(QuantizeChoice::Int8),
        comm: Some(CommChoice::Local),
        comm_timeout: Some(7),
        expert_parallel_size: Some(3),
        redundant_experts: Some(2),
        max_num_batched_tokens: Some(100),
        no_prefix_caching: Some(true),
        generation_config: Some("none".to_owned()),
        ..RawOptions::default()
    })
    .unwrap();
    let expected = ModelOptions {
        device: DeviceChoice::Cpu,
        dtype: DType::F32,
        quantize: Some(QuantizeChoice::Int8),
        threads: 5,
        comm: CommChoice::Local,
        comm_timeout: Duration::from_secs(7),
        check_weights: false,
    };
    assert_eq!(options.model, expected);
    let plain = Precision::of(DType::F32, &spec().moe.router);
    assert_eq!(options.model.precision(&spec().moe.router), plain.with_experts(DType::I8));
    assert_eq!(options.experts.slots_per_rank, 4);
    assert_eq!(options.scheduler.prefill_chunk_size, 100);
    assert!(!options.cache.prefix_caching);
    assert_eq!(options.server.generation_config, GenerationConfig::None);
}

#[test]
fn fp8_and_int4_experts_need_a_gpu_and_bf16() {
    for (choice, name) in [(QuantizeChoice::Fp8, "fp8"), (QuantizeChoice::Int4, "int4")] {
        let raw = RawOptions { quantize: Some(choice), ..RawOptions::default() };
        let on_cpu = refusal(RawOptions { device: Some(DeviceChoice::Cpu), ..raw.clone() });
        assert!(
            on_cpu.contains(&format!("{name} experts are computed on GPUs only, found device cpu")),
            "{on_cpu}"
        );
        let in_f32 = refusal(RawOptions { dtype: Some(DtypeChoice::F32), ..raw.clone() });
        assert!(in_f32.contains(name) && in_f32.contains("found dtype f32"), "{in_f32}");
        let mut jumps = spec();
        jumps.moe.router.score = Score::SparseMixer { epsilon: 0.01 };
        let refused = Options::resolve(raw.clone(), &jumps, 1).unwrap_err().to_string();
        assert!(refused.contains("activations in f32"), "{refused}");
        let mut odd = spec();
        odd.hidden_size += 4;
        let refused = Options::resolve(raw.clone(), &odd, 1).unwrap_err().to_string();
        assert!(refused.contains("a multiple of 8, found"), "{refused}");
        for device in [None, Some(DeviceChoice::Auto), Some(DeviceChoice::Cuda)] {
            let options = Options::resolve(RawOptions { device, ..raw.clone() }, &spec(), 1).unwrap();
            assert_eq!(options.model.precision(&spec().moe.router).experts, choice.dtype());
        }
    }
}

#[test]
fn int8_experts_need_a_cpu_and_sums_that_fit() {
    let int8 = RawOptions { quantize: Some(QuantizeChoice::Int8), ..RawOptions::default() };
    let on_gpu = refusal(RawOptions { device: Some(DeviceChoice::Cuda), ..int8.clone() });
    assert!(on_gpu.contains("quantize") && on_gpu.contains("found device cuda"), "{on_gpu}");
    let mut wide = spec();
    wide.moe.intermediate = int8::MAX_INPUTS + 1;
    let refused = Options::resolve(int8.clone(), &wide, 1).unwrap_err().to_string();
    assert!(refused.contains("133144 products at most") && refused.contains("133145 wide"), "{refused}");
    wide.moe.intermediate -= 1;
    Options::resolve(int8, &wide, 1).unwrap();
}

#[test]
fn there_is_at_least_one_thread_per_rank() {
    let raw = RawOptions { expert_parallel_size: Some(8), ..RawOptions::default() };
    assert_eq!(Options::resolve(raw, &spec(), 2).unwrap().model.threads, 1);
}

#[test]
fn experts_move_where_they_can() {
    let given = RawOptions::default;
    let two = || RawOptions { expert_parallel_size: Some(2), ..given() };
    let rebalance = |raw| resolve(raw).unwrap().experts.rebalance;
    assert_eq!(rebalance(two()), None);
    assert_eq!(rebalance(RawOptions { rebalance: Some(Mode::Off), ..given() }), Some(Mode::Off));
    let fixed = RawOptions { staging_slots: Some(0), ..two() };
    assert_eq!(rebalance(fixed.clone()), Some(Mode::Off));
    let nowhere = "a single expert-parallel rank has nowhere to move experts to";
    let no_place = "no expert moves: there is no staging place (staging-slots)";
    let auto = Some(Mode::Auto);
    for (raw, key, why) in [
        (RawOptions { rebalance: auto, ..given() }, "rebalance", nowhere),
        (RawOptions { rebalance_window: Some(9), ..given() }, "rebalance-window", nowhere),
        (RawOptions { rebalance: auto, ..fixed }, "rebalance", no_place),
        (
            RawOptions { rebalance_window: Some(0), ..two() },
            "rebalance-window",
            "expected 1 to 1048576, found 0",
        ),
    ] {
        assert_eq!(refusal(raw), format!("{key}: {why}"));
    }
}

#[test]
fn limits_are_named_with_the_value() {
    let none = RawOptions::default;
    for (raw, message) in [
        (
            RawOptions { max_model_len: Some(32769), ..none() },
            "max-model-len: expected 1 to 32768, found 32769",
        ),
        (RawOptions { threads: Some(0), ..none() }, "threads: expected 1 to 1024, found 0"),
        (RawOptions { block_size: Some(8), ..none() }, "block-size: expected 16 to 1024, found 8"),
        (RawOptions { block_size: Some(40), ..none() }, "block-size: expected a multiple of 16, found 40"),
        (
            RawOptions { max_num_seqs: Some(300), max_num_batched_tokens: Some(299), ..none() },
            "max-num-batched-tokens: expected 300 to 1048576, found 299",
        ),
        (
            RawOptions { prefill_chunk_size: Some(4096), ..none() },
            "prefill-chunk-size: expected 1 to 2048, found 4096",
        ),
        (RawOptions { redundant_experts: Some(9), ..none() }, "redundant-experts: expected 0 to 8, found 9"),
        (
            RawOptions { max_queued_requests: Some(0), ..none() },
            "max-queued-requests: expected 1 to 1048576, found 0",
        ),
        (RawOptions { comm_timeout: Some(0), ..none() }, "comm-timeout: expected 1 to 86400, found 0"),
        (RawOptions { step_timeout: Some(0), ..none() }, "step-timeout: expected 1 to 86400, found 0"),
        (
            RawOptions { drain_timeout: Some(86401), ..none() },
            "drain-timeout: expected 0 to 86400, found 86401",
        ),
    ] {
        assert_eq!(refusal(raw), message);
    }
    let moving = RawOptions { expert_parallel_size: Some(2), ..none() };
    assert_eq!(resolve(moving.clone()).unwrap().experts.staging_slots, 1);
    let limits = [
        (
            RawOptions { staging_slots: Some(65), ..moving.clone() },
            "staging-slots: expected 0 to 64, found 65",
        ),
        (
            RawOptions { staging_slots: Some(2), ..none() },
            "staging-slots: a single expert-parallel rank has nowhere to move experts to, found 2",
        ),
        (
            RawOptions { rebalance_bandwidth: Some(ByteSize(1000)), ..moving.clone() },
            "rebalance-bandwidth: expected at least 1.0 MiB per second, found 1000 B",
        ),
        (
            RawOptions { rebalance_bandwidth: Some(ByteSize(1 << 30)), staging_slots: Some(0), ..moving },
            "rebalance-bandwidth: no expert moves: there is no staging place (staging-slots)",
        ),
    ];
    for (raw, message) in limits {
        assert_eq!(refusal(raw), message);
    }
    let both = RawOptions { placement: Some("p.json".into()), redundant_experts: Some(1), ..none() };
    assert!(refusal(both).contains("give one of the two"));
}
