//! Tokenizers, streams and chat templates against the goldens of every fixture and demo model, and what a damaged
//! tokenizer is refused with.

#[path = "support/fixtures.rs"]
mod fixtures;

use fixtures::{FIXTURES, model_dir};
use moeyard::tokenizer::chat::from_json;
use moeyard::tokenizer::{ChatError, ChatInput, Detokenizer, Tokenizer, TokenizerFiles};
use moeyard::{Error, Result};
use proptest::prelude::*;
use serde_json::{Value as Json, json};
use std::fs;
use std::path::Path;
use std::sync::LazyLock;
use std::time::{SystemTime, UNIX_EPOCH};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// A checkpoint's tokenizer files, so that tests can damage them.
#[derive(Clone)]
struct Files {
    tokenizer_json: Option<Vec<u8>>,
    tokenizer_config: Option<Vec<u8>>,
    special_tokens_map: Option<Vec<u8>>,
    chat_template: Option<Vec<u8>>,
}

impl Files {
    fn of(folder: &Path) -> Files {
        let read = |name: &str| fs::read(folder.join(name)).ok();
        Files {
            tokenizer_json: read("tokenizer.json"),
            tokenizer_config: read("tokenizer_config.json"),
            special_tokens_map: read("special_tokens_map.json"),
            chat_template: read("chat_template.jinja"),
        }
    }

    fn load(&self, embedding_rows: usize) -> Result<Tokenizer> {
        let files = TokenizerFiles {
            checkpoint: "a checkpoint",
            tokenizer_json: self.tokenizer_json.as_deref(),
            tokenizer_config: self.tokenizer_config.as_deref(),
            special_tokens_map: self.special_tokens_map.as_deref(),
            chat_template: self.chat_template.as_deref(),
        };
        Tokenizer::from_parts(&files, embedding_rows)
    }

    /// Changes one of the JSON files.
    fn edit(bytes: &mut Option<Vec<u8>>, change: impl FnOnce(&mut Json)) {
        let mut json: Json = serde_json::from_slice(bytes.as_ref().unwrap()).unwrap();
        change(&mut json);
        *bytes = Some(json.to_string().into_bytes());
    }
}

fn golden(folder: &Path) -> Json {
    serde_json::from_slice(&fs::read(folder.join("golden.json")).unwrap()).unwrap()
}

fn ids(json: &Json) -> Vec<u32> {
    json.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

fn list<'a>(json: &'a Json, key: &str) -> &'a [Json] {
    json[key].as_array().map_or(&[], Vec::as_slice)
}

fn streamed(tokenizer: &Tokenizer, ids: &[u32], skip_special: bool) -> String {
    let mut stream = Detokenizer::new(tokenizer, skip_special);
    let mut text: String = ids.iter().map(|&id| stream.push(id)).collect();
    text.push_str(&stream.finish());
    text
}

fn chat(messages: &Json, add_generation_prompt: bool) -> ChatInput {
    ChatInput {
        messages: from_json(messages),
        add_generation_prompt,
        tools: None,
        documents: None,
        extra: Vec::new(),
        now: UNIX_EPOCH,
    }
}

/// Every `tokenizer` and `chats` case of a golden.json; returns how many there were.
fn check_golden(folder: &Path, tokenizer: &Tokenizer) -> (usize, usize) {
    let golden = golden(folder);
    for case in list(&golden, "tokenizer") {
        let text = case["text"].as_str().unwrap();
        let at = format!("{}: {text:?}", folder.display());
        assert_eq!(tokenizer.encode(text, true).unwrap(), ids(&case["ids"]), "{at}");
        assert_eq!(tokenizer.encode(text, false).unwrap(), ids(&case["ids_no_special"]), "{at}");
        assert_eq!(tokenizer.decode(&ids(&case["ids"]), true), case["decoded"].as_str().unwrap(), "{at}");
        assert_eq!(streamed(tokenizer, &ids(&case["ids"]), true), case["decoded"].as_str().unwrap(), "{at}");
    }
    for case in list(&golden, "chats") {
        let at = format!("{}: {}", folder.display(), case["messages"]);
        let add_generation_prompt = case["add_generation_prompt"].as_bool().unwrap();
        let rendered = tokenizer.render_chat(&chat(&case["messages"], add_generation_prompt));
        if let Some(message) = case["raises"].as_str() {
            assert_eq!(rendered, Err(ChatError::Refused(message.into())), "{at}");
        } else {
            let text = rendered.unwrap();
            assert_eq!(text, case["text"].as_str().unwrap(), "{at}");
            assert_eq!(tokenizer.encode(&text, false).unwrap(), ids(&case["input_ids"]), "{at}");
        }
    }
    (list(&golden, "tokenizer").len(), list(&golden, "chats").len())
}

#[test]
fn goldens_of_all_fixtures() {
    for name in FIXTURES {
        let folder = model_dir(name);
        let config: Json = serde_json::from_slice(&fs::read(folder.join("config.json")).unwrap()).unwrap();
        let rows = config["vocab_size"].as_u64().unwrap() as usize;
        let tokenizer = Files::of(&folder).load(rows).unwrap();
        assert_eq!(check_golden(&folder, &tokenizer), (6, 4), "{name}");
    }
}

#[test]
fn goldens_of_the_demo_models() {
    for name in ["demo-mixtral", "demo-deepseek"] {
        let folder = Path::new(ROOT).join("models").join(name);
        let tokenizer = Files::of(&folder).load(4096).unwrap();
        let golden = golden(&folder);
        assert_eq!(list(&golden, "prompts").len(), 10);
        for case in list(&golden, "prompts") {
            let prompt = case["prompt"].as_str().unwrap();
            let prompt_ids = if case["kind"] == "chat" {
                let input = chat(&json!([{"role": "user", "content": prompt}]), true);
                let text = tokenizer.render_chat(&input).unwrap();
                assert_eq!(text, case["text"].as_str().unwrap(), "{name}");
                tokenizer.encode(&text, false).unwrap()
            } else {
                tokenizer.encode(prompt, true).unwrap()
            };
            assert_eq!(prompt_ids, ids(&case["prompt_ids"]), "{name}: {prompt:?}");
            let continued = ids(&case["f32_ids"]);
            assert_eq!(
                tokenizer.decode(&continued, true),
                case["f32_text"].as_str().unwrap(),
                "{name}: {prompt:?}"
            );
        }
    }
}

static LLAMA: LazyLock<Tokenizer> =
    LazyLock::new(|| Files::of(&model_dir("mixtral_llama")).load(512).unwrap());
static LLAMA_REFERENCE: LazyLock<tokenizers::Tokenizer> = LazyLock::new(|| reference("mixtral_llama"));
static BYTE_LEVEL: LazyLock<Tokenizer> =
    LazyLock::new(|| Files::of(&model_dir("qwen3_moe")).load(544).unwrap());
static BYTE_LEVEL_REFERENCE: LazyLock<tokenizers::Tokenizer> = LazyLock::new(|| reference("qwen3_moe"));

/// The `tokenizers` library's own decoder, the slow reference of ours.
fn reference(name: &str) -> tokenizers::Tokenizer {
    tokenizers::Tokenizer::from_file(model_dir(name).join("tokenizer.json")).unwrap()
}

#[test]
fn a_llama_tokenizer_equals_the_tokenizers_library() {
    let folder = model_dir("mixtral_llama");
    assert_eq!(check_golden(&folder, &LLAMA).0, 28);
    for case in list(&golden(&folder), "decode") {
        for (skip_special, key) in [(true, "decoded"), (false, "decoded_with_special")] {
            let expected = case[key].as_str().unwrap();
            assert_eq!(LLAMA.decode(&ids(&case["ids"]), skip_special), expected, "{case}");
            assert_eq!(streamed(&LLAMA, &ids(&case["ids"]), skip_special), expected, "{case}");
        }
    }
    assert_eq!((LLAMA.vocab_size(), LLAMA.bos_id(), LLAMA.eos_id()), (512, Some(1), Some(2)));
    let input = chat(&json!([{"role": "user", "content": "Ping"}]), true);
    assert_eq!(LLAMA.render_chat(&input).unwrap(), "<s> [INST] Ping [/INST]");
}

#[test]
fn characters_come_out_whole_and_at_once() {
    let check = |tokenizer: &Tokenizer, text: &str| {
        let mut stream = Detokenizer::new(tokenizer, true);
        let mut seen = String::new();
        for id in tokenizer.encode(text, true).unwrap() {
            let piece = stream.push(id);
            assert!(!piece.contains('\u{FFFD}'), "{text:?}: {piece:?} after {seen:?}");
            seen.push_str(&piece);
            assert!(text.starts_with(&seen), "{text:?}: {seen:?}");
        }
        // The last token completed the last character: nothing was held back.
        assert_eq!(seen, text);
        assert_eq!(stream.finish(), "");
    };
    for text in ["Grüße 你好，世界。 🙂🚀", " two  spaces", "👩‍👩‍👧‍👦\n\té e\u{301}", "สวัสดีครับ", "\u{10FFFF}"]
    {
        check(&LLAMA, text);
        check(&BYTE_LEVEL, &text.replace("e\u{301}", "")); // its normalizer composes characters
    }
}

#[test]
fn the_leading_space_is_stripped_only_at_the_very_start() {
    let mut stream = Detokenizer::new(&LLAMA, true);
    let space = LLAMA.token_id("\u{2581}").unwrap();
    let a = LLAMA.token_id("a").unwrap();
    let pieces: Vec<String> = [1, space, space, a, space, a].map(|id| stream.push(id)).into();
    assert_eq!(pieces, ["", "", " ", "a", " ", "a"]);
    assert_eq!((LLAMA.token_text(space).as_str(), LLAMA.token_text(a).as_str()), (" ", "a"));
}

#[test]
fn bytes_that_never_form_a_character_do_not_pile_up() {
    let byte = |value: u8| LLAMA.token_id(&format!("<0x{value:02X}>")).unwrap();
    assert_eq!(LLAMA.token_bytes(byte(0xE2)), [0xE2]);
    for lone in [0x80, 0xE2, 0xF0, 0xFF] {
        let mut stream = Detokenizer::new(&LLAMA, true);
        let out: usize = (0..100_000).map(|_| stream.push(byte(lone)).chars().count()).sum();
        assert!((99_997..=100_000).contains(&out), "{lone:#x}: {out} replacement characters while streaming");
        assert_eq!(out + stream.finish().chars().count(), 100_000);
    }
}

#[test]
fn a_malformed_byte_costs_only_itself() {
    let byte = |value: u8| LLAMA.token_id(&format!("<0x{value:02X}>")).unwrap();
    let mixed = [0xE2, 0x82, 0xAC, 0xFF, 0x41].map(byte);
    assert_eq!(streamed(&LLAMA, &mixed, true), "€\u{FFFD}A");
    assert_eq!(LLAMA.decode(&mixed, true), "€\u{FFFD}A");
}

#[test]
fn ids_beyond_the_vocabulary_are_nothing() {
    assert_eq!(BYTE_LEVEL.vocab_size(), 512);
    assert_eq!(BYTE_LEVEL.decode(&[512, 543, u32::MAX], false), "");
    assert_eq!((BYTE_LEVEL.token_text(520).as_str(), BYTE_LEVEL.token_bytes(u32::MAX)), ("", &[][..]));
    assert!(BYTE_LEVEL.is_special(511) && !BYTE_LEVEL.is_special(512) && !BYTE_LEVEL.is_special(100));
    assert_eq!(BYTE_LEVEL.bos_id(), None);
}

proptest! {
    #[test]
    fn byte_level_streams_equal_the_library_for_any_ids(list in prop::collection::vec(0u32..544, 0..60), skip in any::<bool>()) {
        let expected = BYTE_LEVEL_REFERENCE.decode(&list, skip).unwrap();
        prop_assert_eq!(streamed(&BYTE_LEVEL, &list, skip), expected.clone());
        prop_assert_eq!(BYTE_LEVEL.decode(&list, skip), expected);
    }

    #[test]
    fn llama_streams_equal_the_library_for_any_text(text in any::<String>(), skip in any::<bool>()) {
        let list = LLAMA.encode(&text, true).unwrap();
        prop_assert_eq!(&list[..], LLAMA_REFERENCE.encode(text.as_str(), true).unwrap().get_ids().to_vec());
        let expected = LLAMA_REFERENCE.decode(&list, skip).unwrap();
        prop_assert_eq!(streamed(&LLAMA, &list, skip), expected.clone());
        prop_assert_eq!(LLAMA.decode(&list, skip), expected);
    }

    #[test]
    fn llama_streams_equal_whole_decoding_for_any_ids(list in prop::collection::vec(0u32..530, 0..60), skip in any::<bool>()) {
        let text = LLAMA.decode(&list, skip);
        prop_assert_eq!(streamed(&LLAMA, &list, skip), text.clone());
        // Where the library's run-wide replacement does not apply, it agrees; else we keep at least as much text.
        let expected = LLAMA_REFERENCE.decode(&list, skip).unwrap();
        let lost = |s: &str| s.matches('\u{FFFD}').count();
        prop_assert!(lost(&text) <= lost(&expected));
        prop_assert!(lost(&expected) > 0 || text == expected);
    }
}

/// The problems a checkpoint is refused with, one string each.
fn refused(files: &Files, rows: usize) -> Vec<String> {
    match files.load(rows) {
        Err(Error::Checkpoint(problems)) => problems.list.iter().map(ToString::to_string).collect(),
        Err(other) => panic!("expected Error::Checkpoint, found {other}"),
        Ok(_) => panic!("expected a refusal"),
    }
}

#[test]
fn damaged_tokenizers_are_refused_with_every_problem() {
    let good = Files::of(&model_dir("mixtral_llama"));
    let check = |rows: usize, words: &[&str], damage: &dyn Fn(&mut Files)| {
        let mut files = good.clone();
        damage(&mut files);
        let problems = refused(&files, rows);
        assert_eq!(problems.len(), 1, "{problems:?}");
        for word in words {
            assert!(problems[0].contains(word), "{word:?} is not in {:?}", problems[0]);
        }
    };
    check(512, &["tokenizer.json", "use_fast=True", "save_pretrained"], &|f| f.tokenizer_json = None);
    check(511, &["tokenizer.json", "511 rows", "512 tokens", "id 511"], &|_| ());
    check(0, &["0 rows"], &|_| ());
    check(512, &["tokenizer_config.json", "chat_template", "syntax error"], &|f| {
        Files::edit(&mut f.tokenizer_config, |c| c["chat_template"] = json!("{% for %}"));
    });
    check(512, &["chat_template.jinja", "UTF-8"], &|f| f.chat_template = Some(vec![0xFF]));
    check(512, &["chat_template", "default", "tool_use"], &|f| {
        Files::edit(&mut f.tokenizer_config, |c| {
            c["chat_template"] = json!([{"name": "tool_use", "template": ""}])
        });
    });
    check(512, &["eos_token", "<end>"], &|f| {
        Files::edit(&mut f.tokenizer_config, |c| c["eos_token"] = json!("<end>"));
    });
    check(512, &["tokenizer_config.json", "JSON object"], &|f| f.tokenizer_config = Some(b"[1".to_vec()));
    check(512, &["decoder", "CTC as stage 1"], &|f| {
        let ctc = json!({"type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "|", "cleanup": true});
        Files::edit(&mut f.tokenizer_json, |t| t["decoder"] = ctc);
    });
    check(512, &["tokenizer.json"], &|f| {
        Files::edit(&mut f.tokenizer_json, |t| t["post_processor"]["special_tokens"] = json!({}));
    });
    let both = Files { tokenizer_json: None, chat_template: Some(b"{% if".to_vec()), ..good.clone() };
    assert_eq!(refused(&both, 512).len(), 2);
}

#[test]
fn a_tokenizer_truncated_anywhere_is_refused() {
    let good = Files::of(&model_dir("mixtral_llama"));
    let bytes = good.tokenizer_json.clone().unwrap();
    let end = bytes.trim_ascii_end().len();
    for cut in (0..end).step_by(97).chain([end - 1]) {
        refused(&Files { tokenizer_json: Some(bytes[..cut].to_vec()), ..good.clone() }, 512);
    }
}

#[test]
fn bos_and_eos_switches_of_llama_classes_go_before_the_post_processor() {
    let ids_with = |class: &str, bos: Json, eos: Json, processor: bool| {
        let mut files = Files::of(&model_dir("mixtral_llama"));
        Files::edit(&mut files.tokenizer_config, |c| {
            c["tokenizer_class"] = json!(class);
            c["add_bos_token"] = bos;
            c["add_eos_token"] = eos;
        });
        if !processor {
            Files::edit(&mut files.tokenizer_json, |t| t["post_processor"] = Json::Null);
        }
        files.load(512).unwrap().encode("\n", true).unwrap()
    };
    let text = [505, 13];
    let (bos, both) = ([1, 505, 13], [1, 505, 13, 2]);
    assert_eq!(ids_with("LlamaTokenizerFast", json!(true), json!(false), false), bos);
    assert_eq!(ids_with("LlamaTokenizer", json!(true), json!(true), true), both);
    assert_eq!(ids_with("LlamaTokenizer", json!(false), json!(false), true), text);
    assert_eq!(ids_with("PreTrainedTokenizerFast", json!(true), json!(true), false), text);
    assert_eq!(ids_with("PreTrainedTokenizerFast", json!(false), json!(false), true), bos);
}

#[test]
fn truncation_and_padding_of_the_file_do_not_change_prompts() {
    let mut files = Files::of(&model_dir("mixtral_llama"));
    Files::edit(&mut files.tokenizer_json, |t| {
        t["truncation"] =
            json!({"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0});
        t["padding"] = json!({"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0,
            "pad_type_id": 0, "pad_token": "<unk>"});
    });
    let text = "Hello, world!";
    assert_eq!(files.load(512).unwrap().encode(text, true).unwrap(), LLAMA.encode(text, true).unwrap());
}

#[test]
fn a_chat_needs_a_template_and_jinja_goes_before_the_config() {
    let mut files = Files::of(&model_dir("mixtral_llama"));
    let messages = json!([{"role": "user", "content": "x"}]);
    files.chat_template = Some(b"{{ messages[0].content }}{{ pad_token is defined }}".to_vec());
    assert_eq!(files.load(512).unwrap().render_chat(&chat(&messages, true)).unwrap(), "xFalse");
    files.chat_template = None;
    Files::edit(&mut files.tokenizer_config, |c| {
        c["chat_template"] =
            json!([{"name": "tools", "template": "t"}, {"name": "default", "template": "d{{ bos_token }}"}]);
    });
    assert_eq!(files.load(512).unwrap().render_chat(&chat(&messages, true)).unwrap(), "d<s>");
    Files::edit(&mut files.tokenizer_config, |c| c["chat_template"] = Json::Null);
    let tokenizer = files.load(512).unwrap();
    assert!(tokenizer.chat_template().is_none());
    assert_eq!(
        tokenizer.render_chat(&ChatInput { now: SystemTime::now(), ..chat(&messages, true) }),
        Err(ChatError::Missing)
    );
}
