//! What a reader hands out, against the tensors read by the reference implementation.

use crate::broken::{Copy, Loose, load};
use crate::fixtures::{FIXTURES, model_dir};
use crate::specs::describe;
use half::{bf16, f16};
use moeyard::backend::cpu::CpuBackend;
use moeyard::backend::{Backend, DType, HostData, HostMatrix};
use moeyard::spec::Quantization;
use moeyard::weights::{
    Checkpoint, EmbeddedFile, MlpKind, Part, Role, RoleShape, WeightReader, parameters, stored_bytes,
    validate,
};
use safetensors::tensor::Dtype;
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

/// All tensors of a fixture.
fn tensors(name: &str) -> BTreeMap<String, Loose> {
    let mut all = BTreeMap::new();
    for entry in std::fs::read_dir(model_dir(name)).unwrap() {
        let path = entry.unwrap().path();
        let file = path.file_name().unwrap().to_str().unwrap().to_owned();
        if file.starts_with("model") && file.ends_with(".safetensors") {
            all.extend(load(&std::fs::read(path).unwrap()));
        }
    }
    all
}

impl Loose {
    fn floats(&self) -> Vec<f32> {
        match self.dtype {
            Dtype::F32 => self.data.chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect(),
            Dtype::F16 => {
                self.data.chunks(2).map(|b| f16::from_le_bytes(b.try_into().unwrap()).to_f32()).collect()
            }
            Dtype::BF16 => {
                self.data.chunks(2).map(|b| bf16::from_le_bytes(b.try_into().unwrap()).to_f32()).collect()
            }
            other => panic!("{other}"),
        }
    }
}

fn f32s(matrix: HostMatrix<'_>) -> Vec<f32> {
    match matrix.data {
        HostData::F32(data) => data,
        HostData::Bf16(data) => data.iter().map(|x| x.to_f32()).collect(),
        HostData::Quantized(data) => data.weights().into_iter().map(bf16::to_f32).collect(),
    }
}

/// Every second element, from the first or the second on.
fn alternate(row: &[f32], from: usize) -> Vec<f32> {
    row.iter().skip(from).step_by(2).copied().collect()
}

/// `[rows, cols]` -> `[cols, rows]`
fn transpose(matrix: &[f32], rows: usize) -> Vec<f32> {
    let cols = matrix.len() / rows;
    (0..cols).flat_map(|c| (0..rows).map(move |r| matrix[r * cols + c])).collect()
}

#[test]
fn slices_of_a_sharded_checkpoint() {
    let all = tensors("mixtral");
    let (spec, names) = describe(&model_dir("mixtral"));
    let checkpoint = Checkpoint::open(&model_dir("mixtral")).unwrap();
    for dtype in [DType::F32, DType::Bf16] {
        let reader = WeightReader::new(&checkpoint, &spec, &names, dtype);
        let q = reader.matrix(Role::Q, 1, 16..40, 3..20).unwrap();
        assert_eq!((q.n, q.k), (24, 17));
        assert!(matches!(
            (&q.data, dtype),
            (HostData::F32(_), DType::F32) | (HostData::Bf16(_), DType::Bf16)
        ));
        let whole = all["model.layers.1.self_attn.q_proj.weight"].floats();
        let expected: Vec<f32> = (16..40).flat_map(|r| whole[r * 64 + 3..r * 64 + 20].to_vec()).collect();
        assert_eq!(f32s(q), expected);
        assert_eq!(reader.vector(Role::FinalNorm, 0, 5..9).unwrap(), all["model.norm.weight"].floats()[5..9]);
        assert_eq!(reader.bias(Role::Q, 1, 0..64).unwrap(), None);
        assert_eq!(
            f32s(reader.embedding(7..8).unwrap()),
            all["model.embed_tokens.weight"].floats()[7 * 64..8 * 64]
        );
        assert_eq!(f32s(reader.whole_matrix(Role::Head, 0).unwrap()), all["lm_head.weight"].floats());

        let mlp = reader.mlp(MlpKind::Expert(5), 0, 10..30).unwrap();
        let part =
            |which: &str| all[&format!("model.layers.0.block_sparse_moe.experts.5.{which}.weight")].floats();
        assert_eq!(f32s(mlp.gate), part("w1")[10 * 64..30 * 64]);
        assert_eq!(f32s(mlp.up), part("w3")[10 * 64..30 * 64]);
        let down: Vec<f32> = part("w2").chunks(80).flat_map(|row| row[10..30].to_vec()).collect();
        assert_eq!(f32s(mlp.down), down);
        assert!(mlp.bias.is_none());
    }
}

#[test]
fn fused_experts_of_granite_and_a_tied_head() {
    let all = tensors("granitemoe");
    let (spec, names) = describe(&model_dir("granitemoe"));
    let checkpoint = Checkpoint::open(&model_dir("granitemoe")).unwrap();
    let reader = WeightReader::new(&checkpoint, &spec, &names, DType::F32);
    let (hidden, inner) = (64, 32);
    let input = all["model.layers.1.block_sparse_moe.input_linear.weight"].floats();
    let output = all["model.layers.1.block_sparse_moe.output_linear.weight"].floats();
    for expert in [0, 9] {
        let mlp = reader.mlp(MlpKind::Expert(expert), 1, 0..inner).unwrap();
        let both = &input[expert * 2 * inner * hidden..][..2 * inner * hidden];
        assert_eq!(f32s(mlp.gate), both[..inner * hidden]);
        assert_eq!(f32s(mlp.up), both[inner * hidden..]);
        assert_eq!(f32s(mlp.down), output[expert * hidden * inner..][..hidden * inner]);
    }
    let head = reader.whole_matrix(Role::Head, 0).unwrap();
    assert_eq!(f32s(head), all["model.embed_tokens.weight"].floats());
}

#[test]
fn interleaved_experts_of_gpt_oss_with_biases() {
    let all = tensors("gpt_oss");
    let (spec, names) = describe(&model_dir("gpt_oss"));
    let checkpoint = Checkpoint::open(&model_dir("gpt_oss")).unwrap();
    let (hidden, inner) = (64, 48);
    let gate_up = all["model.layers.1.mlp.experts.gate_up_proj"].floats();
    let down = all["model.layers.1.mlp.experts.down_proj"].floats();
    let gate_up_bias = all["model.layers.1.mlp.experts.gate_up_proj_bias"].floats();
    let down_bias = all["model.layers.1.mlp.experts.down_proj_bias"].floats();
    for dtype in [DType::F32, DType::Bf16] {
        let reader = WeightReader::new(&checkpoint, &spec, &names, dtype);
        for expert in [0, 7] {
            // [hidden, 2 * inner] -> [2 * inner, hidden]
            let rows = transpose(&gate_up[expert * hidden * 2 * inner..][..hidden * 2 * inner], hidden);
            let row = |i: usize| rows[i * hidden..(i + 1) * hidden].to_vec();
            let mlp = reader.mlp(MlpKind::Expert(expert), 1, 11..30).unwrap();
            assert_eq!(f32s(mlp.gate), (11..30).flat_map(|i| row(2 * i)).collect::<Vec<f32>>());
            assert_eq!(f32s(mlp.up), (11..30).flat_map(|i| row(2 * i + 1)).collect::<Vec<f32>>());
            let columns = &down[expert * inner * hidden + 11 * hidden..expert * inner * hidden + 30 * hidden];
            assert_eq!(f32s(mlp.down), transpose(columns, 19));
            let bias = mlp.bias.unwrap();
            let both = &gate_up_bias[expert * 2 * inner..][..2 * inner];
            assert_eq!(bias.gate, alternate(both, 0)[11..30]);
            assert_eq!(bias.up, alternate(both, 1)[11..30]);
            // The bias of down comes once, with the first slice.
            assert_eq!(bias.down, vec![0.0; hidden]);
            let first = reader.mlp(MlpKind::Expert(expert), 1, 0..11).unwrap();
            assert_eq!(first.bias.unwrap().down, down_bias[expert * hidden..][..hidden]);
        }
        assert_eq!(
            reader.whole_vector(Role::Sinks, 0).unwrap(),
            all["model.layers.0.self_attn.sinks"].floats()
        );
        let router_bias = reader.bias(Role::Router, 0, 0..8).unwrap();
        assert_eq!(router_bias.unwrap(), all["model.layers.0.mlp.router.bias"].floats());
    }
}

/// A gpt-oss checkpoint whose experts are MXFP4, as published: the same values must come out as from the floats.
#[test]
fn mxfp4_experts_of_gpt_oss() {
    let mut copy = Copy::of("gpt_oss");
    copy.spec.quantization = Some(Quantization::Mxfp4);
    let (experts, hidden, inner) = (8, 64, 48);
    let value = |expert: usize, row: usize, col: usize| (expert * 7 + row * 5 + col * 3) % 16;
    let scale = |expert: usize, row: usize, block: usize| 120 + (expert + row + block) % 9;
    let quantise = |rows: usize, cols: usize| {
        let per_row = usize::div_ceil(cols, 32);
        let (mut blocks, mut scales) = (Vec::new(), Vec::new());
        for (expert, row) in (0..experts).flat_map(|e| (0..rows).map(move |r| (e, r))) {
            for block in 0..per_row {
                scales.push(scale(expert, row, block) as u8);
                for pair in 0..16 {
                    let col = block * 32 + 2 * pair;
                    blocks.push((value(expert, row, col) | (value(expert, row, col + 1) << 4)) as u8);
                }
            }
        }
        let blocks = Loose { dtype: Dtype::U8, shape: vec![experts, rows, per_row, 16], data: blocks };
        (blocks, Loose { dtype: Dtype::U8, shape: vec![experts, rows, per_row], data: scales })
    };
    copy.edit_tensors("model.safetensors", |tensors| {
        for layer in 0..2 {
            for (name, rows, cols) in [("gate_up_proj", 2 * inner, hidden), ("down_proj", hidden, inner)] {
                let name = format!("model.layers.{layer}.mlp.experts.{name}");
                tensors.remove(&name);
                let (blocks, scales) = quantise(rows, cols);
                tensors.insert(format!("{name}_blocks"), blocks);
                tensors.insert(format!("{name}_scales"), scales);
            }
        }
    });
    assert!(copy.accepted().is_empty());
    let element = |expert, row, col| {
        let table =
            [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0f32];
        table[value(expert, row, col)] * 2f32.powi(scale(expert, row, col / 32) as i32 - 127)
    };
    let checkpoint = Checkpoint::open(copy.path()).unwrap();
    let reader = WeightReader::new(&checkpoint, &copy.spec, &copy.names, DType::F32);
    let mlp = reader.mlp(MlpKind::Expert(3), 1, 5..41).unwrap();
    let rows = |from: usize| {
        (5..41).flat_map(move |i| (0..hidden).map(move |c| element(3, 2 * i + from, c))).collect::<Vec<f32>>()
    };
    assert_eq!(f32s(mlp.gate), rows(0));
    assert_eq!(f32s(mlp.up), rows(1));
    let down: Vec<f32> = (0..hidden).flat_map(|r| (5..41).map(move |c| element(3, r, c))).collect();
    assert_eq!(f32s(mlp.down), down);

    copy.edit_tensors("model.safetensors", |tensors| {
        tensors.remove("model.layers.1.mlp.experts.down_proj_scales");
    });
    copy.refused_with(&[
        "model.safetensors: model.layers.1.mlp.experts.down_proj_scales: expected U8 [8, 64, 2], found no such tensor",
    ]);
}

#[test]
fn quantised_matrices_in_bf16_are_the_f32_ones_rounded_once() {
    for name in ["deepseek_v3_fp8", "mixtral_awq", "mixtral_gptq"] {
        let (spec, names) = describe(&model_dir(name));
        let checkpoint = Checkpoint::open(&model_dir(name)).unwrap();
        let reader = WeightReader::new(&checkpoint, &spec, &names, DType::F32);
        for rows in [0..90, 3..80] {
            let wide = f32s(reader.matrix(Role::O, 1, rows.clone(), 10..75).unwrap());
            let narrow = reader.with_dtype(DType::Bf16).matrix(Role::O, 1, rows, 10..75).unwrap();
            let rounded: Vec<f32> = wide.iter().map(|&x| bf16::from_f32(x).to_f32()).collect();
            assert_eq!(f32s(narrow), rounded, "{name}");
            assert!(wide.iter().filter(|x| **x != 0.0).count() > wide.len() / 2, "{name}: mostly zeros");
        }
    }
}

#[test]
fn everything_can_be_read_and_progress_adds_up() {
    for name in FIXTURES {
        let (spec, names) = describe(&model_dir(name));
        let checkpoint = Checkpoint::open(&model_dir(name)).unwrap();
        let read = AtomicU64::new(0);
        let progress = |bytes| {
            read.fetch_add(bytes, Ordering::Relaxed);
        };
        let reader = WeightReader::new(&checkpoint, &spec, &names, DType::F32).with_progress(&progress);
        let mut elements = 0;
        let mut matrix = |role, layer| elements += f32s(reader.whole_matrix(role, layer).unwrap()).len();
        use Role::*;
        matrix(Embed, 0);
        if !spec.tied_embeddings {
            matrix(Head, 0);
        }
        for layer in 0..spec.layers.len() {
            for role in [Q, K, V, O, QA, QB, KvA, KvB] {
                if reader.shape(role).is_some() {
                    matrix(role, layer);
                }
            }
        }
        for &layer in &spec.moe_layers() {
            for role in [Router, SharedGate] {
                if reader.shape(role).is_some() {
                    matrix(role, layer);
                }
            }
        }
        let mut vector = |role, layer| {
            if let Some(shape) = reader.shape(role) {
                if !matches!(shape, RoleShape::Matrix { .. }) {
                    elements += reader.whole_vector(role, layer).unwrap().len();
                }
                let len = match shape {
                    RoleShape::Matrix { n, .. } => n,
                    RoleShape::Norm { width, .. } => width,
                    RoleShape::Bare { .. } => 0,
                };
                elements += reader.bias(role, layer, 0..len).unwrap().map_or(0, |bias| bias.len());
            }
        };
        vector(FinalNorm, 0);
        vector(Head, 0);
        for layer in 0..spec.layers.len() {
            for role in [
                InputNorm,
                PostAttentionNorm,
                Q,
                K,
                V,
                O,
                QNorm,
                KNorm,
                Sinks,
                QA,
                QANorm,
                QB,
                KvA,
                KvANorm,
                KvB,
            ] {
                vector(role, layer);
            }
        }
        for &layer in &spec.moe_layers() {
            vector(Router, layer);
            vector(ChoiceBias, layer);
        }
        let mut mlp = |kind, layer| {
            let mlp = reader.mlp(kind, layer, 0..reader.intermediate(kind, layer)).unwrap();
            elements += [mlp.gate, mlp.up, mlp.down].map(|matrix| f32s(matrix).len()).iter().sum::<usize>();
            elements += mlp.bias.map_or(0, |bias| bias.gate.len() + bias.up.len() + bias.down.len());
        };
        for layer in 0..spec.layers.len() {
            if !spec.moe_layers().contains(&layer) {
                mlp(MlpKind::Dense, layer);
                continue;
            }
            for expert in 0..spec.moe.experts {
                mlp(MlpKind::Expert(expert), layer);
            }
            if spec.moe.shared.is_some() {
                mlp(MlpKind::Shared, layer);
            }
        }
        let expected: u64 = parameters(&spec, &names).iter().map(|(_, count)| count).sum();
        assert_eq!(elements as u64, expected, "{name}: parameters");
        // Zero biases beside GPTQ matrices are part of the file but never read.
        let stored: u64 = stored_bytes(&checkpoint, &spec, &names).iter().map(|(_, bytes)| bytes).sum();
        let read = read.into_inner();
        if name == "mixtral_gptq" {
            assert!(read < stored, "{name}: {read} of {stored}");
        } else {
            assert_eq!(read, stored, "{name}: bytes");
        }
        assert!(stored <= checkpoint.tensor_bytes(), "{name}");
    }
}

#[test]
fn parts_of_a_model_are_counted() {
    let (spec, names) = describe(&model_dir("mixtral"));
    let checkpoint = Checkpoint::open(&model_dir("mixtral")).unwrap();
    let expected = [
        (Part::Embedding, 512 * 64),
        (Part::Head, 512 * 64),
        (Part::Norms, 5 * 64),
        (Part::Attention, 2 * (64 * 64 * 2 + 32 * 64 * 2)),
        (Part::Routers, 2 * 8 * 64),
        (Part::Experts, 2 * 8 * 3 * 80 * 64),
    ];
    assert_eq!(parameters(&spec, &names), expected);
    assert_eq!(stored_bytes(&checkpoint, &spec, &names), expected.map(|(part, count)| (part, 2 * count)));
}

#[test]
fn a_checkpoint_inside_the_program() {
    let read = |file: &str| &*std::fs::read(model_dir("olmoe").join(file)).unwrap().leak();
    let files: Vec<EmbeddedFile> =
        vec![("config.json", read("config.json")), ("model.safetensors", read("model.safetensors"))];
    let checkpoint = Checkpoint::embedded(files.leak());
    let (spec, names) = describe(&model_dir("olmoe"));
    assert!(validate(&checkpoint, &spec, &names).unwrap().is_empty());
    let reader = WeightReader::new(&checkpoint, &spec, &names, DType::F32);
    let norm = reader.whole_vector(Role::FinalNorm, 0).unwrap();
    assert_eq!(norm, tensors("olmoe")["model.norm.weight"].floats());
    assert!(checkpoint.text("tokenizer.json").unwrap().is_none());
}

/// A run with experts in fp8 reads codes and scales of routed and shared ones, as they are stored where a slice leaves the blocks whole,
/// and everything else as ever.
#[test]
fn experts_in_fp8_are_read_as_they_are_stored() {
    let all = tensors("deepseek_v3_fp8");
    let (spec, names) = describe(&model_dir("deepseek_v3_fp8"));
    let checkpoint = Checkpoint::open(&model_dir("deepseek_v3_fp8")).unwrap();
    let plain = WeightReader::new(&checkpoint, &spec, &names, DType::Bf16);
    let fp8 = plain.with_experts(DType::F8);
    let layer = spec.moe_layers()[0];
    let (hidden, width) = (spec.hidden_size, spec.moe.intermediate);
    let codes = |matrix: &HostMatrix<'_>| match &matrix.data {
        HostData::Quantized(quantized) => quantized.codes().to_vec(),
        other => panic!("{other:?}"),
    };
    let (read, expected) =
        (fp8.mlp(MlpKind::Expert(1), layer, 0..width), plain.mlp(MlpKind::Expert(1), layer, 0..width));
    let (read, expected) = (read.unwrap(), expected.unwrap());
    let stored =
        |which: &str| all[&format!("model.layers.{layer}.mlp.experts.1.{which}.weight")].data.clone();
    assert_eq!(codes(&read.gate), stored("gate_proj"));
    assert_eq!(codes(&read.down), stored("down_proj"));
    for (read, expected) in [(read.gate, expected.gate), (read.up, expected.up), (read.down, expected.down)] {
        assert_eq!(f32s(read), f32s(expected));
    }
    // A slice that cuts through a block is quantised anew; what is not in an expert stays bf16.
    let cut = fp8.mlp(MlpKind::Expert(1), layer, 68..width).unwrap();
    let exact = plain.with_dtype(DType::F32).mlp(MlpKind::Expert(1), layer, 68..width).unwrap();
    assert_eq!(codes(&cut.down).len(), hidden * (width - 68));
    let greatest = f32s(exact.down.clone()).iter().fold(0.0f32, |greatest, x| greatest.max(x.abs()));
    for (found, expected) in f32s(cut.down).into_iter().zip(f32s(exact.down)) {
        assert!((found - expected).abs() <= greatest / 24.0, "{found}, {expected}");
    }
    assert!(matches!(fp8.mlp(MlpKind::Shared, layer, 0..width).unwrap().up.data, HostData::Quantized(_)));
    let dense = (0..spec.layers.len()).find(|l| !spec.moe_layers().contains(l)).expect("a dense layer");
    assert!(matches!(fp8.mlp(MlpKind::Dense, dense, 0..8).unwrap().up.data, HostData::Bf16(_)));
    assert!(matches!(fp8.whole_matrix(Role::KvA, layer).unwrap().data, HostData::Bf16(_)));
}

/// What is read may lie in the file (the compiler sees to it that nobody keeps it), what is packed never does: a file that is cut
/// afterwards, and the checkpoint dropped, harms nobody.
#[test]
fn a_file_cut_after_loading_does_not_matter() {
    let copy = Copy::of("mixtral");
    let checkpoint = Checkpoint::open(copy.path()).unwrap();
    let backend = CpuBackend::detect(1).unwrap();
    let reader = WeightReader::new(&checkpoint, &copy.spec, &copy.names, DType::Bf16);
    let matrix = reader.whole_matrix(Role::Embed, 0).unwrap();
    let (n, k) = (matrix.n, matrix.k);
    let packed = backend.pack_matrix(&matrix, DType::Bf16).unwrap();
    drop(matrix);
    drop(checkpoint);
    std::fs::File::create(copy.file("model.safetensors")).unwrap();

    let stored = tensors("mixtral")["model.embed_tokens.weight"].floats();
    let mut x = backend.alloc(DType::F32, 1, k).unwrap();
    let mut out = backend.alloc(DType::F32, 1, n).unwrap();
    for column in [0, k / 2, k - 1] {
        let row: Vec<f32> = (0..k).map(|i| f32::from(u8::from(i == column))).collect();
        backend.upload(bytemuck::cast_slice(&row), x.view_mut()).unwrap();
        backend.linear(x.view(), &packed, None, out.view_mut()).unwrap();
        let mut found = vec![0.0f32; n];
        backend.download(out.view(), bytemuck::cast_slice_mut(&mut found)).unwrap();
        let wanted: Vec<f32> = (0..n).map(|j| bf16::from_f32(stored[j * k + column]).to_f32()).collect();
        assert_eq!(found, wanted, "column {column}");
    }
}

/// Matrices that a file holds as bfloat16 are handed out where they are; others, and parts of rows, as copies of the same numbers.
#[test]
fn bf16_stays_in_the_file() {
    let copy = Copy::of("qwen3_moe");
    let checkpoint = Checkpoint::open(copy.path()).unwrap();
    let reader = WeightReader::new(&checkpoint, &copy.spec, &copy.names, DType::Bf16);
    let Some(RoleShape::Matrix { n, k, .. }) = reader.shape(Role::O) else { panic!("a matrix") };
    let read = |rows, cols| {
        let matrix = reader.matrix(Role::O, 0, rows, cols).unwrap();
        let in_place = matches!(&matrix.data, HostData::Bf16(Cow::Borrowed(_)));
        (f32s(matrix), in_place)
    };
    let stored = tensors("qwen3_moe")["model.layers.0.self_attn.o_proj.weight"].floats();
    assert_eq!(read(0..n, 0..k), (stored.clone(), true));
    assert_eq!(read(3..n, 0..k), (stored[3 * k..].to_vec(), true));
    assert_eq!(read(n..n, 0..k), (vec![], true));
    let columns: Vec<f32> = stored.chunks(k).flat_map(|row| &row[2..]).copied().collect();
    assert_eq!(read(0..n, 2..k), (columns, false));
}

/// A reader on a broken checkpoint that nobody validated returns errors, never panics.
#[test]
fn reading_what_is_not_there_is_an_error() {
    let copy = Copy::of("olmoe");
    copy.edit_tensors("model.safetensors", |tensors| {
        tensors.remove("model.norm.weight");
    });
    let checkpoint = Checkpoint::open(copy.path()).unwrap();
    let reader = WeightReader::new(&checkpoint, &copy.spec, &copy.names, DType::F32);
    let error = reader.whole_vector(Role::FinalNorm, 0).unwrap_err().to_string();
    assert!(
        error.contains("model.norm.weight: expected F32, F16 or BF16 [64], found no such tensor"),
        "{error}"
    );
    copy.edit("model.safetensors", |bytes| bytes.truncate(5));
    let checkpoint = Checkpoint::open(copy.path()).unwrap();
    let reader = WeightReader::new(&checkpoint, &copy.spec, &copy.names, DType::F32);
    assert!(reader.embedding(0..1).unwrap_err().to_string().contains("8 bytes of header length"));
}
