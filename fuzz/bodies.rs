//! What each fuzz target does with its bytes: hands them to the door that strangers' bytes come through. Beyond not
//! panicking, whatever is refused must say why in a bounded text.

use std::sync::OnceLock;
use std::time::SystemTime;

use moeyard::error::Problems;
use moeyard::server::{CompletionRequest, SamplingDefaults};
use moeyard::tokenizer::chat::from_json;
use moeyard::tokenizer::{ChatInput, ChatTemplate, Tokenizer, TokenizerFiles};
use moeyard::weights::read_header;
use router_sim::trace::TraceReader;

/// Messages about one file or request stay readable, however much is wrong with it.
const MAX_MESSAGE_CHARS: usize = 100_000;

/// The body of a completion request.
pub fn request(data: &[u8]) {
    let defaults = SamplingDefaults::default();
    if let Err(error) = CompletionRequest::parse(data, &defaults) {
        assert_eq!(error.status.as_u16(), 400, "{}", error.message);
        assert!(!error.message.is_empty() && error.message.chars().count() < MAX_MESSAGE_CHARS);
    }
}

/// A safetensors file.
pub fn safetensors(data: &[u8]) {
    let mut problems = Problems::new("fuzz");
    let header = read_header("model.safetensors", data, &mut problems);
    assert!(header.is_some() || !problems.list.is_empty(), "refused without a reason");
    for problem in &problems.list {
        assert!(problem.to_string().chars().count() < MAX_MESSAGE_CHARS);
    }
}

/// A routing trace.
pub fn trace(data: &[u8]) {
    let Ok(reader) = TraceReader::new(data) else { return };
    for record in reader {
        if let Err(error) = record {
            assert!(error.to_string().chars().count() < MAX_MESSAGE_CHARS);
            break;
        }
    }
}

/// A conversation for a chat template, or a template, a zero byte, and a conversation for it.
pub fn chat(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let (template, messages) = match text.split_once('\0') {
        Some((template, messages)) => (template, messages),
        None => (DEMO_TEMPLATE, &*text),
    };
    let Ok(template) = ChatTemplate::compile(template) else { return };
    let Ok(messages) = serde_json::from_str::<serde_json::Value>(messages) else { return };
    let input = ChatInput {
        messages: from_json(&messages),
        add_generation_prompt: true,
        tools: None,
        documents: None,
        extra: Vec::new(),
        now: SystemTime::UNIX_EPOCH,
    };
    if let Err(error) = tokenizer().render_chat_with(&template, &input) {
        assert!(error.to_string().chars().count() < MAX_MESSAGE_CHARS);
    }
}

const DEMO_TEMPLATE: &str = include_str!("../models/demo-mixtral/chat_template.jinja");

/// Templates read its special tokens.
fn tokenizer() -> &'static Tokenizer {
    static TOKENIZER: OnceLock<Tokenizer> = OnceLock::new();
    TOKENIZER.get_or_init(|| {
        let files = TokenizerFiles {
            checkpoint: "demo-mixtral",
            tokenizer_json: Some(include_bytes!("../models/demo-mixtral/tokenizer.json")),
            tokenizer_config: Some(include_bytes!("../models/demo-mixtral/tokenizer_config.json")),
            ..TokenizerFiles::default()
        };
        Tokenizer::from_parts(&files, 4096).expect("the demo model's tokenizer")
    })
}
