//! A byte-level BPE of 32,000 entries: three special tokens, all bytes, and as many pairs of bytes as are left.

use serde_json::{Map, Value, json};

const ENTRIES: usize = 32_000;
const SPECIAL: [&str; 3] = ["<unk>", "<s>", "</s>"];

/// tokenizer.json.
pub fn tokenizer() -> Value {
    let alphabet = byte_alphabet();
    let mut vocab = Map::new();
    for token in SPECIAL.map(str::to_owned).into_iter().chain(alphabet.iter().map(char::to_string)) {
        let id = vocab.len();
        vocab.insert(token, json!(id));
    }
    let mut merges = Vec::new();
    let pairs = alphabet.iter().flat_map(|a| alphabet.iter().map(move |b| (a, b)));
    for (a, b) in pairs.take(ENTRIES - vocab.len()) {
        merges.push(json!([a.to_string(), b.to_string()]));
        let id = vocab.len();
        vocab.insert(format!("{a}{b}"), json!(id));
    }
    let added: Vec<Value> = SPECIAL.iter().enumerate().map(|(id, token)| added_token(id, token)).collect();
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocab, "merges": merges
        }
    })
}

/// tokenizer_config.json.
pub fn config() -> Value {
    json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": SPECIAL[0], "bos_token": SPECIAL[1], "eos_token": SPECIAL[2],
        "add_bos_token": false, "model_max_length": 8192, "clean_up_tokenization_spaces": false
    })
}

fn added_token(id: usize, content: &str) -> Value {
    json!({
        "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
        "special": true
    })
}

/// GPT-2's printable stand-ins for the 256 bytes: the visible characters of Latin-1 for themselves, the others from U+0100 on.
fn byte_alphabet() -> Vec<char> {
    let visible = |byte: &u32| matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    let hidden = 256 - (0..256).filter(visible).count() as u32;
    let codes = (0..256).filter(visible).chain(256..256 + hidden);
    codes.map(|code| char::from_u32(code).expect("below the surrogates")).collect()
}
