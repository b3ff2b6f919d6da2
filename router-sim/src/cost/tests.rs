use super::*;
use crate::topology::Cluster;

/// Two nodes of two devices with round numbers and one rail.
const CLUSTER: &str = r#"
name = "round"
nodes = 2
devices-per-node = 2
[device]
name = "d"
kind = "gpu"
memory-gib = 1
memory-gb-per-s = 1
tflops = { bf16 = 1, fp8 = 2 }
usd-per-hour = 3.6
[within-node]
kind = "nvlink"
gb-per-s = 1
latency-us = 2
[between-nodes]
kind = "infiniband"
rails = 1
gb-per-s = 0.5
latency-us = 5
"#;

const MODEL: &str = r#"{"model_type": "m", "hidden_size": 100, "num_hidden_layers": 3, "num_attention_heads": 2,
 "num_key_value_heads": 1, "head_dim": 10, "num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 50,
 "vocab_size": 1000}"#;

fn exact() -> Constants {
    Constants {
        compute_efficiency: 1.0,
        memory_efficiency: 1.0,
        within_node_efficiency: 1.0,
        between_nodes_efficiency: 1.0,
        expert_overhead_us: 7.0,
        exchange_overhead_us: 1.0,
        layer_overhead_us: 3.0,
        step_overhead_us: 11.0,
        context_tokens: 0.0,
        migration_gb_per_s: 1.0,
        ..Constants::default()
    }
}

fn cost(constants: &Constants) -> CostModel {
    let (cluster, model) =
        (Cluster::from_toml(CLUSTER).unwrap(), ModelShape::from_config(MODEL, "").unwrap());
    CostModel::new(&cluster, 4, &model, constants).unwrap()
}

#[test]
fn experts_are_a_roofline() {
    let cost = cost(&exact());
    // 6 h i = 30,000 operations at 1e6 per us; 3 h i x 2 = 30,000 bytes at 1e3 per us; 1,000 bytes per token.
    assert_eq!(cost.experts_us(0, 0), 0.0);
    assert_eq!(cost.experts_us(1, 1), 30.0 + 1.0 + 7.0);
    assert_eq!(cost.experts_us(10, 2), 60.0 + 10.0 + 7.0);
    // Products never catch up here: a token's activations alone take longer.
    assert_eq!(cost.ridge_tokens_per_expert(), f64::INFINITY);
    let measured =
        Constants { expert_us_per_token: Some(4.0), expert_us_per_activated: Some(9.0), ..exact() };
    let cost = self::cost(&measured);
    assert_eq!(cost.ridge_tokens_per_expert(), 3.0);
    assert_eq!((cost.experts_us(2, 1), cost.experts_us(5, 1)), (11.0 + 7.0, 20.0 + 7.0));
}

#[test]
fn exchanges_wait_for_the_most_loaded_endpoint() {
    let cluster = Cluster::from_toml(CLUSTER).unwrap();
    let mut endpoints = Endpoints::new(&cluster, 4);
    // 0 -> 1: 3 rows within a node. 0 -> 2: 2, 1 -> 3: 1 and 3 -> 0: 1 between nodes, over one rail per node.
    let mut rows = [0; 16];
    (rows[0], rows[1], rows[2], rows[4 + 3], rows[12]) = (9, 3, 2, 1, 1);
    endpoints.count(WireUnit::Row, &rows, &[]);
    assert_eq!(endpoints.most_loaded(), (3, 3));
    // 200 bytes per row: 3 x 0.2 us within, 3 x 0.4 us between; the latency is the network's.
    let (dispatch, combine) = cost(&exact()).exchanges_us(&endpoints);
    assert!((dispatch - (5.0 + 1.0 + 1.2)).abs() < 1e-9 && dispatch == combine);
    let hidden = Constants { hidden_share: 0.75, combine: Precision::F32, ..exact() };
    let (dispatch, combine) = cost(&hidden).exchanges_us(&endpoints);
    assert!((dispatch - 7.2 / 4.0).abs() < 1e-9 && (combine - 8.4 / 4.0).abs() < 1e-9);
    // One token of 0 for both ranks of the other node crosses the network once and is passed on by 2.
    let mut pairs = [0; 16];
    (pairs[2], pairs[3]) = (1, 1);
    endpoints.count(WireUnit::Node, &pairs, &[0, 1, 0, 0, 0, 0, 0, 0]);
    assert_eq!(endpoints.most_loaded(), (1, 1));
    endpoints.count(WireUnit::Rank, &pairs, &[]);
    assert_eq!(endpoints.most_loaded(), (0, 2));
    // What stays at home costs nothing.
    let mut rows = [0; 16];
    rows[0] = 5;
    endpoints.count(WireUnit::Row, &rows, &[]);
    assert_eq!(cost(&exact()).exchanges_us(&endpoints), (0.0, 0.0));
}

#[test]
fn the_rest_of_a_step() {
    let cost = cost(&exact());
    // Attention 2 x 100 x 20 + 2 x 100 x 10 = 6,000 weights and a router of 400: 12,800 bytes at 1e3 per us.
    assert!((cost.other_us(1, 1) - (12.8 + 3.0)).abs() < 1e-9);
    assert!((cost.other_us(10_000, 0) - (128.0 + 3.0)).abs() < 1e-9);
    assert_eq!(cost.other_us(0, 0), 3.0);
    // No dense layer; a head of 100,000 weights for what is generated.
    assert_eq!(cost.outside_us(5, 0), 11.0);
    assert!((cost.outside_us(5, 1) - (200.0 + 11.0)).abs() < 1e-9);
    // 3.6 dollars per hour and device: 4 devices for an hour.
    assert!((cost.usd(3.6e9).unwrap() - 14.4).abs() < 1e-9);
    assert_eq!((cost.expert_bytes(), cost.migration_us(3)), (30_000.0, 90.0));
}

#[test]
fn presets_have_their_published_sizes() {
    let of = |name: &str| ModelShape::find(name).unwrap();
    let deepseek = of("deepseek-v3");
    assert_eq!((deepseek.moe_layers, deepseek.dense_layers, deepseek.shared_intermediate), (58, 3, 2048));
    assert_eq!(deepseek.expert_bytes(Precision::Fp8), 44_040_192.0);
    // 187 million attention weights per layer.
    assert!(
        (deepseek.attention_parameters() / 1e6 - 187.1).abs() < 0.1,
        "{}",
        deepseek.attention_parameters()
    );
    assert_eq!(of("mixtral-8x7b").expert_bytes(Precision::Bf16), 3.0 * 4096.0 * 14336.0 * 2.0);
    assert_eq!(ModelShape::of_shape(32, Some(4), 24).unwrap().name, "gpt-oss-20b");
    assert_eq!(ModelShape::of_shape(32, Some(4), 23), None);
    for name in presets() {
        assert_eq!(of(name).name, name);
    }
}

#[test]
fn refusals_name_key_limit_and_value() {
    let error = |e: Error| e.to_string();
    assert!(error(ModelShape::find("no-such").unwrap_err()).contains("deepseek-v3, gpt-oss-20b"));
    for (from, to, expected) in [
        ("\"hidden_size\": 100", "\"hidden_size\": 0", "hidden_size 0 is not within 1..=16777216"),
        ("\"num_experts_per_tok\": 2", "\"num_experts_per_tok\": 5", "num_experts_per_tok 5 exceeds 4"),
        ("\"num_experts\": 4,", "", "n_routed_experts"),
        ("\"head_dim\"", "\"kv_lora_rank\"", "kv_lora_rank needs qk_nope_head_dim"),
        ("\"head_dim\"", "\"first_k_dense_replace\"", "first_k_dense_replace 10 exceeds 3"),
    ] {
        let message = error(ModelShape::from_config(&MODEL.replace(from, to), "").unwrap_err());
        assert!(message.contains(expected), "{message:?} should contain {expected:?}");
    }
    let cluster = Cluster::from_toml(CLUSTER).unwrap();
    let model = ModelShape::from_config(MODEL, "").unwrap();
    let refused =
        |ranks, constants: &Constants| error(CostModel::new(&cluster, ranks, &model, constants).unwrap_err());
    assert!(refused(5, &exact()).contains("5 ranks do not fit cluster round: 2 nodes x 2 devices = 4"));
    let fp4 = Constants { expert_weights: Precision::Fp4, ..exact() };
    assert!(refused(4, &fp4).contains("d has no rate for fp4; its tflops list bf16, fp8"));
    let mut constants = exact();
    let mut refused = |text: &str| error(constants.set(&[text.to_owned()]).unwrap_err());
    assert!(
        refused("memory-efficiency=1.5").contains("memory-efficiency = 1.5 must be above 0 and at most 1")
    );
    assert!(refused("memory-efficiency=nan").contains("NaN"));
    assert!(refused("switch-us=-1").contains("switch-us = -1 must be at least 0"));
    assert!(refused("speed=1").contains("speed"));
    assert!(refused("wire=pigeon").contains("pigeon"));
    assert!(refused("wire").contains("is not key=value"));
    assert_eq!(constants, exact());
    constants.set(&["wire=node".into(), "dispatch = fp8".into(), "switch-us=4".into()]).unwrap();
    assert_eq!(
        (constants.wire, constants.dispatch, constants.switch_us),
        (WireUnit::Node, Precision::Fp8, 4.0)
    );
}
