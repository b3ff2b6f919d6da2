//! Faults of files, headers, indices and tensors (the messages are part of the contract with users).

use crate::broken::{Copy, Loose};
use crate::fixtures::{FIXTURES, model_dir};
use crate::specs::describe;
use moeyard::spec::Quantization;
use moeyard::weights::{Checkpoint, check_finite, check_manifest, validate};
use safetensors::tensor::Dtype;
use std::path::Path;

const FIRST: &str = "model-00001-of-00002.safetensors";
const SECOND: &str = "model-00002-of-00002.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const SINGLE: &str = "model.safetensors";

fn data_start(bytes: &[u8]) -> usize {
    8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize
}

#[test]
fn fixtures_and_demo_models_are_accepted_without_warnings() {
    let demos = ["../../models/demo-mixtral", "../../models/demo-deepseek"];
    for name in FIXTURES.into_iter().chain(demos) {
        let (spec, names) = describe(&model_dir(name));
        let checkpoint = Checkpoint::open(&model_dir(name)).unwrap();
        let warnings = validate(&checkpoint, &spec, &names).unwrap_or_else(|error| panic!("{error}"));
        assert!(warnings.is_empty(), "{name}: {warnings:?}");
        check_finite(&checkpoint, &spec, &names, None).unwrap();
    }
}

#[test]
fn a_file_cut_anywhere_is_refused() {
    for cut in ["0", "7", "8", "header", "tensor", "last"] {
        let copy = Copy::of("olmoe");
        let mut whole = 0;
        let mut kept = 0;
        copy.edit(SINGLE, |bytes| {
            whole = bytes.len();
            kept = match cut {
                "header" => data_start(bytes) / 2,
                "tensor" => data_start(bytes) + 100_003,
                "last" => bytes.len() - 1,
                number => number.parse().unwrap(),
            };
            bytes.truncate(kept);
        });
        let problems = copy.refused();
        assert_eq!(problems.len(), 1, "{cut}: {problems:?}");
        assert_eq!(problems[0].file, SINGLE);
        assert!(problems[0].found.contains(&format!("a file of {kept} bytes")), "{cut}: {problems:?}");
        match cut {
            "tensor" | "last" => {
                assert!(problems[0].item.is_some(), "{cut}: {problems:?}");
                assert!(
                    problems[0].expected.contains(&format!("of a file of {whole} bytes")),
                    "{problems:?}"
                );
            }
            "header" | "8" => assert!(problems[0].found.contains("cut inside the header"), "{problems:?}"),
            _ => assert!(problems[0].expected.contains("8 bytes of header length"), "{problems:?}"),
        }
    }
}

#[test]
fn an_absurd_header_costs_no_memory() {
    for length in [1u64 << 63, u64::MAX, 100_000_000] {
        let copy = Copy::of("olmoe");
        copy.edit(SINGLE, |bytes| bytes[..8].copy_from_slice(&length.to_le_bytes()));
        copy.refused_with(&[&format!(
            "{SINGLE}: expected a header length below 100000000 bytes at offset 0, found {length}"
        )]);
    }
}

#[test]
fn a_huge_header_of_spaces_is_refused_unread() {
    let copy = Copy::of("olmoe");
    let file = std::fs::OpenOptions::new().write(true).open(copy.file(SINGLE)).unwrap();
    file.set_len(100_000_100).unwrap();
    copy.edit_head(&100_000_000u64.to_le_bytes());
    assert_eq!(copy.refused().len(), 1);
}

impl Copy {
    /// Overwrites the first bytes of the weights without reading the rest.
    fn edit_head(&self, head: &[u8]) {
        use std::io::Write;
        let mut file = std::fs::OpenOptions::new().write(true).open(self.file(SINGLE)).unwrap();
        file.write_all(head).unwrap();
    }
}

#[test]
fn faults_of_several_shards_come_in_one_list() {
    let copy = Copy::of("mixtral");
    copy.edit_tensors(FIRST, |tensors| {
        let gone = tensors.remove("model.layers.0.self_attn.q_proj.weight").unwrap();
        tensors.get_mut("model.layers.0.self_attn.k_proj.weight").unwrap().shape = vec![64, 32];
        tensors.insert("surprise".to_owned(), gone);
    });
    copy.edit_tensors(SECOND, |tensors| {
        let norm = tensors.get_mut("model.norm.weight").unwrap();
        *norm = Loose { dtype: Dtype::I32, shape: vec![64], data: vec![0; 256] };
    });
    copy.refused_with(&[
        &format!(
            "{FIRST}: model.layers.0.self_attn.q_proj.weight: expected the tensor that {INDEX} says is here, found no \
             such tensor in this shard"
        ),
        &format!(
            "{FIRST}: model.layers.0.self_attn.k_proj.weight: expected F32, F16 or BF16 [32, 64], found BF16 [64, 32]"
        ),
        &format!("{SECOND}: model.norm.weight: expected F32, F16 or BF16 [64], found I32 [64]"),
    ]);
}

#[test]
fn an_absent_shard_is_one_problem_and_hides_no_other() {
    let copy = Copy::of("mixtral");
    std::fs::remove_file(copy.file(SECOND)).unwrap();
    copy.edit_tensors(FIRST, |tensors| {
        tensors.get_mut("model.layers.0.self_attn.k_proj.weight").unwrap().shape = vec![64, 32];
    });
    let problems = copy.refused();
    assert_eq!(problems.len(), 2, "{problems:?}");
    assert_eq!((problems[0].file.as_str(), problems[0].found.as_str()), (SECOND, "no such file"));
    assert!(problems[0].expected.starts_with("the shard that holds "), "{problems:?}");
    assert_eq!(problems[1].item.as_deref(), Some("model.layers.0.self_attn.k_proj.weight"));
}

#[test]
fn an_index_must_be_sound() {
    let copy = Copy::of("mixtral");
    copy.edit(INDEX, |bytes| bytes.truncate(100));
    let problems = copy.refused();
    assert_eq!(problems.len(), 1);
    assert_eq!(problems[0].expected, "JSON with a weight_map of tensor names to files");

    let copy = Copy::of("mixtral");
    copy.replace(INDEX, &format!("\"{SECOND}\""), "\"../secret.safetensors\"");
    copy.refused_with(&[&format!(
        "{INDEX}: expected plain file names in weight_map, found \"../secret.safetensors\""
    )]);

    let copy = Copy::of("mixtral");
    copy.edit(INDEX, |bytes| *bytes = br#"{"weight_map": {}}"#.to_vec());
    let problems = copy.refused();
    assert_eq!(
        problems[0].to_string(),
        format!("{INDEX}: expected a weight_map that names tensors, found an empty one")
    );

    let copy = Copy::of("mixtral");
    let first = std::fs::read(copy.file(FIRST)).unwrap();
    copy.edit_tensors(SECOND, |tensors| {
        let norm = crate::broken::load(&first)["model.layers.0.input_layernorm.weight"].clone();
        tensors.insert("model.layers.0.input_layernorm.weight".to_owned(), norm);
    });
    copy.refused_with(&[&format!(
        "{SECOND}: model.layers.0.input_layernorm.weight: expected a tensor name that no other shard has, found it is \
         also in {FIRST}"
    )]);
}

#[test]
fn missing_tensors_are_all_named() {
    let copy = Copy::of("olmoe");
    copy.edit_tensors(SINGLE, |tensors| {
        tensors.remove("model.embed_tokens.weight");
        tensors.remove("model.layers.1.self_attn.q_norm.weight");
        tensors.remove("model.layers.1.mlp.experts.3.up_proj.weight");
    });
    copy.refused_with(&[
        "model.safetensors: model.embed_tokens.weight: expected F32, F16 or BF16 [512, 64], found no such tensor",
        "model.safetensors: model.layers.1.self_attn.q_norm.weight: expected F32, F16 or BF16 [64], found no such tensor",
        "model.safetensors: model.layers.1.mlp.experts.3.up_proj.weight: expected F32, F16 or BF16 [16, 64], found no \
         such tensor",
    ]);
    let copy = Copy::of("olmoe");
    copy.edit_tensors(SINGLE, |tensors| {
        tensors.retain(|name, _| {
            !name.contains(".experts.") || name.contains("experts.7.") || name.contains("norm")
        });
    });
    copy.refused_with(&[
        "model.safetensors: model.layers.{0-1}.mlp.experts.{0-6,8-15}.gate_proj.weight: expected F32, F16 or BF16 \
         [16, 64], found no such tensor",
        "model.safetensors: model.layers.{0-1}.mlp.experts.{0-6,8-15}.up_proj.weight: expected F32, F16 or BF16 [16, \
         64], found no such tensor",
        "model.safetensors: model.layers.{0-1}.mlp.experts.{0-6,8-15}.down_proj.weight: expected F32, F16 or BF16 \
         [64, 16], found no such tensor",
    ]);
}

#[test]
fn extra_tensors_are_warnings_and_expected_extras_are_silent() {
    let copy = Copy::of("olmoe");
    copy.edit_tensors(SINGLE, |tensors| {
        let some = tensors["model.norm.weight"].clone();
        for name in ["model.surprise", "model.layers.0.surprise.0", "model.layers.1.surprise.0"] {
            tensors.insert(name.to_owned(), some.clone());
        }
        for name in ["model.layers.2.enorm.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"] {
            tensors.insert(name.to_owned(), some.clone());
        }
    });
    assert_eq!(
        copy.accepted(),
        [
            "model.layers.{0-1}.surprise.0: not used by this model, ignored",
            "model.surprise: not used by this model, ignored"
        ]
    );
}

#[test]
fn files_that_are_not_there() {
    let copy = Copy::of("olmoe");
    std::fs::rename(copy.file(SINGLE), copy.file("pytorch_model.bin")).unwrap();
    std::fs::remove_file(copy.file("config.json")).unwrap();
    copy.refused_with(&[
        "config.json: expected the model's configuration, found no such file",
        ".: expected model.safetensors, or shards with model.safetensors.index.json, found pytorch_model.bin",
    ]);
    let error = Checkpoint::open(Path::new("no/such/folder")).unwrap_err().to_string();
    assert!(
        error.contains("expected a folder with config.json and *.safetensors, found No such file"),
        "{error}"
    );
    let error = Checkpoint::open(&copy.file("pytorch_model.bin")).unwrap_err().to_string();
    assert!(error.contains("Not a directory"), "{error}");
}

#[test]
fn companions_of_quantised_matrices_are_checked() {
    let copy = Copy::of("mixtral_gptq");
    let q = "model.layers.0.self_attn.q_proj";
    copy.edit_tensors(SINGLE, |tensors| {
        tensors.remove(&format!("{q}.qzeros"));
        tensors.get_mut(&format!("{q}.scales")).unwrap().shape = vec![128, 4];
        tensors.get_mut("model.layers.0.self_attn.k_proj.g_idx").unwrap().data[3] = 0x80;
        tensors.get_mut("model.layers.0.self_attn.v_proj.bias").unwrap().data[5] = 0x3c;
        // Minus zero adds nothing either.
        tensors.get_mut("model.layers.0.self_attn.o_proj.bias").unwrap().data[1] = 0x80;
    });
    let problems: Vec<String> = copy.refused().iter().map(ToString::to_string).collect();
    let bad_group = problems.iter().position(|p| p.contains("g_idx")).unwrap();
    assert!(
        problems[bad_group].starts_with(
            "model.safetensors: model.layers.0.self_attn.k_proj.g_idx: expected groups 0..4, found group -21474836"
        ),
        "{problems:?}"
    );
    let rest: Vec<&String> = problems.iter().filter(|p| !p.contains("g_idx")).collect();
    assert_eq!(
        rest,
        [
            &format!("{SINGLE}: {q}.qzeros: expected I32 [4, 16], found no such tensor"),
            &format!("{SINGLE}: {q}.scales: expected F32, F16 or BF16 [4, 128], found F16 [128, 4]"),
            &format!(
                "{SINGLE}: model.layers.0.self_attn.v_proj.bias: expected no bias (the configuration has none here), or \
                 zeros, found F16 [64] with values other than zero"
            ),
        ]
    );

    let copy = Copy::of("mixtral_awq");
    copy.edit_tensors(SINGLE, |tensors| {
        let qweight = tensors.get_mut(&format!("{q}.qweight")).unwrap();
        *qweight = Loose { dtype: Dtype::I32, shape: vec![128, 32], data: vec![0; 128 * 32 * 4] };
    });
    copy.refused_with(&[&format!("{SINGLE}: {q}.qweight: expected I32 [128, 16], found I32 [128, 32]")]);

    let copy = Copy::of("deepseek_v3_fp8");
    let kv_a = "model.layers.0.self_attn.kv_a_proj_with_mqa";
    copy.edit_tensors(SINGLE, |tensors| {
        tensors.remove(&format!("{kv_a}.weight_scale_inv"));
    });
    copy.refused_with(&[&format!(
        "{SINGLE}: {kv_a}.weight_scale_inv: expected F32, F16 or BF16 [1, 2], found no such tensor"
    )]);
}

#[test]
fn quantised_tensors_need_a_configuration_that_says_so() {
    let mut copy = Copy::of("mixtral_awq");
    copy.spec.quantization = None;
    let problems = copy.refused();
    assert_eq!(problems[0].item.as_deref(), Some("model.layers.0.self_attn.q_proj.weight"));
    assert_eq!(problems[0].found, "4-bit tensors beside it, but config.json announces no AWQ or GPTQ");
    let mut copy = Copy::of("deepseek_v3_fp8");
    copy.spec.quantization = Some(Quantization::Awq { group_size: Some(32) });
    assert!(copy.refused()[0].found.starts_with("F8_E4M3 ["));
}

#[test]
fn a_config_with_absurd_sizes_is_refused_without_overflow() {
    let mut copy = Copy::of("gpt_oss");
    copy.spec.moe.intermediate = usize::MAX;
    copy.spec.hidden_size = usize::MAX - 1;
    assert!(copy.refused().len() > 10);
    let mut copy = Copy::of("mixtral_gptq");
    copy.spec.quantization = Some(Quantization::Gptq { group_size: Some(0) });
    assert!(!copy.refused().is_empty());
}

#[test]
fn non_finite_weights_are_named() {
    let copy = Copy::of("olmoe");
    copy.edit_tensors(SINGLE, |tensors| {
        let set = |tensor: &mut Loose, i: usize, value: f32| {
            tensor.data[4 * i..4 * i + 4].copy_from_slice(&value.to_le_bytes());
        };
        set(tensors.get_mut("model.layers.1.mlp.experts.5.up_proj.weight").unwrap(), 64 * 3 + 9, f32::NAN);
        set(tensors.get_mut("model.layers.0.input_layernorm.weight").unwrap(), 2, f32::NEG_INFINITY);
        set(tensors.get_mut("model.layers.0.input_layernorm.weight").unwrap(), 7, f32::NAN);
    });
    copy.accepted();
    let checkpoint = Checkpoint::open(copy.path()).unwrap();
    let error = check_finite(&checkpoint, &copy.spec, &copy.names, None).unwrap_err().to_string();
    let lines: Vec<&str> = error.lines().skip(1).map(str::trim).collect();
    assert_eq!(
        lines,
        [
            "model.safetensors: model.layers.0.input_layernorm.weight: expected finite values in layer 0, found -inf at \
             [2], 2 such values in all",
            "model.safetensors: model.layers.1.mlp.experts.5.up_proj: expected finite values in layer 1, expert 5, found \
             NaN at [3, 9]",
        ]
    );
}

#[test]
fn a_flipped_bit_is_found_by_the_manifest() {
    let copy = Copy::of("olmoe");
    let checkpoint = Checkpoint::open(copy.path()).unwrap();
    assert!(!check_manifest(&checkpoint).unwrap());
    // The published sums of the fixture, cut to its folder.
    let all = std::fs::read_to_string(model_dir("SHA256SUMS")).unwrap();
    let sum = all
        .lines()
        .find_map(|line| line.strip_suffix("olmoe/model.safetensors"))
        .map(|sum| sum.trim_end_matches("./").trim().to_owned())
        .expect("the fixture in SHA256SUMS");
    std::fs::write(copy.file("SHA256SUMS"), format!("{sum}  {SINGLE}\n")).unwrap();
    assert!(check_manifest(&checkpoint).unwrap());
    copy.edit(SINGLE, |bytes| *bytes.last_mut().unwrap() ^= 1);
    let checkpoint = Checkpoint::open(copy.path()).unwrap();
    let error = check_manifest(&checkpoint).unwrap_err().to_string();
    assert!(
        error.contains(&format!("{SINGLE}: expected SHA-256 {sum}, according to SHA256SUMS, found ")),
        "{error}"
    );
}
