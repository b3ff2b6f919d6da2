//! `moeyard verify`: runs the prompts of a `moe-fixture-dump/1` file through the real scheduler and the paged cache, and
//! writes what the engine computed in the same schema, so that another implementation can be compared with it.
//!
//! The keys present in the input are the request: `last_logits`, `all_logits` and `router` of any value ask for theirs,
//! `greedy` for as many tokens as its `tokens` has (24 without), end-of-text tokens ignored. Every `tokenizer` and `chats`
//! case is redone. Float tensors go to a safetensors file beside the dump, so two dumps compare bit for bit.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use clap::Args;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Map, Value, json};

use super::Settings;
use super::launch::{Needs, Prepared};
use super::model::OpenModel;
use crate::engine::RequestStream;
use crate::engine::request::{Capture, Captured, Event, FinishReason, Request, TokenEvent};
use crate::error::{Error, Result};
use crate::model::Routing;
use crate::tokenizer::Tokenizer;
use crate::tokenizer::chat::{ChatInput, from_json};

const SCHEMA: &str = "moe-fixture-dump/1";
/// Greedy tokens when the input does not say.
const GREEDY_TOKENS: usize = 24;
/// Alternatives reported per greedy token.
const TOP: usize = 5;

/// `moeyard verify`.
#[derive(Args)]
pub struct Arguments {
    /// Checkpoint folder in Hugging Face layout
    #[arg(value_name = "CHECKPOINT")]
    model: PathBuf,
    /// What to run: a moe-fixture-dump/1 file; its keys are the request
    #[arg(long, value_name = "FILE")]
    prompts: PathBuf,
    /// Where to write the dump; its tensors go beside it with the ending .safetensors
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    #[command(flatten)]
    settings: Settings,
}

/// Runs the file and writes the dump.
pub(super) fn run(arguments: Arguments) -> Result<()> {
    let raw = arguments.settings.read()?;
    let input = Input::read(&arguments.prompts)?;
    let model = OpenModel::open_as(Some(&arguments.model), raw.load_format)?;
    let jobs = input.jobs(&model.tokenizer)?;
    // All prompts are queued at once, so that they share batches as requests of a server would.
    let needs = Needs { prompt_logits: true, queue: Some(jobs.len().max(1)) };
    let prepared = Prepared::new(model, raw, needs)?;
    let launched = prepared.launch(needs, None)?;
    let mut dump = Dump::new(&prepared);
    let outcome = run_jobs(&launched.engine, &jobs, &mut dump);
    launched.finish(Duration::ZERO, Duration::MAX)?;
    outcome?;
    input.redo_text(&prepared.model.tokenizer, &mut dump)?;
    dump.write(&arguments.out, &input)
}

/// The parsed request file.
struct Input {
    name: String,
    json: Value,
}

/// One prompt to run.
struct Job {
    id: Value,
    tokens: Vec<u32>,
    last_logits: bool,
    all_logits: bool,
    router: bool,
    /// Tokens to generate.
    greedy: Option<usize>,
}

impl Input {
    fn read(path: &Path) -> Result<Input> {
        let name = path.display().to_string();
        let bytes = std::fs::read(path).map_err(|e| Error::io(path, e))?;
        let json: Value = serde_json::from_slice(&bytes).map_err(|e| Error::config(&name, e.to_string()))?;
        let schema = json.get("schema").and_then(Value::as_str).unwrap_or("none");
        if schema != SCHEMA {
            return Err(Error::config(name, format!("schema: expected {SCHEMA}, found {schema}")));
        }
        Ok(Input { name, json })
    }

    fn refuse(&self, why: impl Into<String>) -> Error {
        Error::config(&self.name, why)
    }

    /// A list of objects under a key; absent is empty.
    fn list(&self, key: &str) -> Result<Vec<&Map<String, Value>>> {
        let items = match self.json.get(key) {
            None | Some(Value::Null) => return Ok(Vec::new()),
            Some(Value::Array(items)) => items,
            Some(_) => return Err(self.refuse(format!("{key}: expected a list"))),
        };
        items
            .iter()
            .enumerate()
            .map(|(i, item)| {
                item.as_object().ok_or_else(|| self.refuse(format!("{key}[{i}]: expected an object")))
            })
            .collect()
    }

    fn jobs(&self, tokenizer: &Tokenizer) -> Result<Vec<Job>> {
        self.list("prompts")?.into_iter().map(|prompt| self.job(prompt, tokenizer)).collect()
    }

    fn job(&self, prompt: &Map<String, Value>, tokenizer: &Tokenizer) -> Result<Job> {
        let id = prompt.get("id").cloned().unwrap_or(Value::Null);
        let tokens = match (prompt.get("input_ids"), prompt.get("text")) {
            (Some(ids), _) => serde_json::from_value(ids.clone())
                .map_err(|e| self.refuse(format!("prompt {id}: input_ids: {e}")))?,
            (None, Some(Value::String(text))) => tokenizer.encode(text, true)?,
            _ => return Err(self.refuse(format!("prompt {id}: expected input_ids or text"))),
        };
        let greedy = prompt
            .get("greedy")
            .map(|greedy| greedy.get("tokens").and_then(Value::as_array).map_or(GREEDY_TOKENS, Vec::len));
        Ok(Job {
            id,
            tokens,
            last_logits: prompt.contains_key("last_logits"),
            all_logits: prompt.contains_key("all_logits"),
            router: prompt.contains_key("router"),
            greedy,
        })
    }

    /// Redoes the tokenizer and chat cases.
    fn redo_text(&self, tokenizer: &Tokenizer, dump: &mut Dump) -> Result<()> {
        for (i, case) in self.list("tokenizer")?.into_iter().enumerate() {
            let Some(Value::String(text)) = case.get("text") else {
                return Err(self.refuse(format!("tokenizer[{i}]: expected a text")));
            };
            let ids = tokenizer.encode(text, true)?;
            dump.tokenizer.push(json!({
                "text": text,
                "ids": ids,
                "ids_no_special": tokenizer.encode(text, false)?,
                "decoded": tokenizer.decode(&ids, true),
            }));
        }
        for (i, case) in self.list("chats")?.into_iter().enumerate() {
            let Some(messages) = case.get("messages") else {
                return Err(self.refuse(format!("chats[{i}]: expected messages")));
            };
            dump.chats.push(redo_chat(case, messages, tokenizer)?);
        }
        Ok(())
    }
}

fn redo_chat(case: &Map<String, Value>, messages: &Value, tokenizer: &Tokenizer) -> Result<Value> {
    let add = case.get("add_generation_prompt").cloned().unwrap_or(Value::Bool(false));
    let rendered = tokenizer.render_chat(&ChatInput {
        messages: from_json(messages),
        add_generation_prompt: add.as_bool().unwrap_or(false),
        tools: case.get("tools").map(from_json),
        documents: None,
        extra: Vec::new(),
        now: SystemTime::now(),
    });
    let mut chat = json!({"messages": messages, "add_generation_prompt": add});
    match rendered {
        Ok(text) => {
            chat["input_ids"] = json!(tokenizer.encode(&text, false)?);
            chat["text"] = Value::String(text);
        }
        Err(error) => chat["raises"] = Value::String(error.to_string()),
    }
    Ok(chat)
}

fn run_jobs(engine: &crate::engine::EngineHandle, jobs: &[Job], dump: &mut Dump) -> Result<()> {
    let streams = jobs.iter().map(|job| engine.submit(job.request())).collect::<Result<Vec<_>>>()?;
    for (job, stream) in jobs.iter().zip(streams) {
        dump.add(job, Answer::wait(stream)?);
    }
    Ok(())
}

impl Job {
    fn request(&self) -> Request {
        Request {
            logprobs: Some(TOP),
            capture: Capture {
                prompt_logits: self.all_logits,
                last_logits: self.last_logits,
                routing: self.router,
            },
            ..Request::greedy(self.tokens.clone(), self.greedy.unwrap_or(0))
        }
    }
}

/// What came of one prompt.
struct Answer {
    tokens: Vec<TokenEvent>,
    captured: Captured,
}

impl Answer {
    fn wait(mut stream: RequestStream) -> Result<Answer> {
        let mut tokens = Vec::new();
        while let Some(event) = stream.blocking_next() {
            match event {
                Event::Prompt(_) => {}
                Event::Token(token) => tokens.push(token),
                Event::Finished(finished) => {
                    if let FinishReason::Error(why) = finished.reason {
                        return Err(Error::Stopped(why));
                    }
                    let captured = finished.captured.map_or_else(Captured::default, |c| *c);
                    return Ok(Answer { tokens, captured });
                }
            }
        }
        Err(Error::Stopped("a prompt never ended".to_owned()))
    }
}

/// The dump in the making.
struct Dump {
    engine: String,
    vocab: usize,
    moe_layers: Vec<usize>,
    prompts: Vec<Value>,
    tokenizer: Vec<Value>,
    chats: Vec<Value>,
    /// Name to type, shape and little-endian bytes.
    tensors: BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>,
}

impl Dump {
    fn new(prepared: &Prepared) -> Dump {
        let parallel = prepared.options.parallel;
        let spec = &prepared.model.family.spec;
        Dump {
            engine: format!(
                "moeyard {} {} TP {} DP {} EP {} on {}",
                env!("CARGO_PKG_VERSION"),
                prepared.types(),
                parallel.tp,
                parallel.dp,
                parallel.ep,
                prepared.backends[0].describe(),
            ),
            vocab: spec.vocab_size,
            moe_layers: spec.moe_layers(),
            prompts: Vec::new(),
            tokenizer: Vec::new(),
            chats: Vec::new(),
            tensors: BTreeMap::new(),
        }
    }

    /// Stores a tensor and returns the reference to it.
    fn tensor(&mut self, name: String, dtype: Dtype, shape: Vec<usize>, bytes: Vec<u8>) -> Value {
        let reference = json!({"tensor": name});
        self.tensors.insert(name, (dtype, shape, bytes));
        reference
    }

    fn f32(&mut self, name: String, shape: Vec<usize>, values: &[f32]) -> Value {
        let bytes = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        self.tensor(name, Dtype::F32, shape, bytes)
    }

    fn add(&mut self, job: &Job, answer: Answer) {
        let name = match &job.id {
            Value::String(id) => id.clone(),
            other => format!("{other}#{}", self.prompts.len()),
        };
        let mut prompt = json!({"id": job.id, "input_ids": job.tokens});
        let logits = &answer.captured.logits;
        if job.last_logits {
            let last = &logits[logits.len() - self.vocab..];
            prompt["last_logits"] = self.f32(format!("{name}.last_logits"), vec![self.vocab], last);
        }
        if job.all_logits {
            let shape = vec![job.tokens.len(), self.vocab];
            prompt["all_logits"] = self.f32(format!("{name}.all_logits"), shape, logits);
        }
        if job.router {
            prompt["router"] = self.router(&name, job.tokens.len(), &answer.captured.routing);
        }
        if job.greedy.is_some() {
            prompt["greedy"] = greedy(&answer.tokens);
        }
        self.prompts.push(prompt);
    }

    /// The choices of the prompt's positions; those of generated ones are left out.
    fn router(&mut self, name: &str, positions: usize, routing: &Routing) -> Value {
        let (rows, k) = (routing.rows, routing.top_k);
        let layers = self.moe_layers.clone();
        let entries = layers.iter().enumerate().map(|(i, layer)| {
            let range = i * rows * k..(i * rows + positions) * k;
            let shape = vec![positions, k];
            let ids = routing.ids[range.clone()].iter().flat_map(|&id| (id as i32).to_le_bytes()).collect();
            let prefix = format!("{name}.layer{layer}");
            json!({
                "layer": layer,
                "expert_ids": self.tensor(format!("{prefix}.expert_ids"), Dtype::I32, shape.clone(), ids),
                "expert_weights": self.f32(format!("{prefix}.expert_weights"), shape, &routing.weights[range]),
            })
        });
        Value::Array(entries.collect())
    }

    /// Writes the tensors first, then the JSON that refers to them; each appears whole or not at all.
    fn write(self, out: &Path, input: &Input) -> Result<()> {
        let tensors_path = out.with_extension("safetensors");
        let views = self
            .tensors
            .iter()
            .map(|(name, (dtype, shape, bytes))| {
                let view = TensorView::new(*dtype, shape.clone(), bytes);
                Ok((name.as_str(), view.map_err(|e| Error::Stopped(format!("tensor {name}: {e}")))?))
            })
            .collect::<Result<Vec<_>>>()?;
        let bytes = safetensors::serialize(views, None).map_err(|e| Error::Stopped(e.to_string()))?;
        write_whole(&tensors_path, &bytes)?;
        let file_name = tensors_path.file_name().map(|n| n.to_string_lossy().into_owned());
        let dump = json!({
            "schema": SCHEMA,
            "fixture": input.json.get("fixture").cloned().unwrap_or(Value::Null),
            "engine": self.engine,
            "tensors_file": file_name,
            "tokenizer": self.tokenizer,
            "chats": self.chats,
            "prompts": self.prompts,
        });
        let text = serde_json::to_vec(&dump).map_err(|e| Error::Stopped(e.to_string()))?;
        write_whole(out, &text)
    }
}

fn greedy(tokens: &[TokenEvent]) -> Value {
    let steps: Vec<Value> =
        tokens.iter().map(|t| json!({"token": t.token, "logprob": t.logprob, "top": t.top})).collect();
    let ids: Vec<u32> = tokens.iter().map(|t| t.token).collect();
    json!({"ignore_eos": true, "tokens": ids, "steps": steps})
}

/// Writes beside the target, then renames: a full disk leaves no half file.
fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".partial");
    let temporary = PathBuf::from(temporary);
    std::fs::write(&temporary, bytes).map_err(|e| Error::io(&temporary, e))?;
    std::fs::rename(&temporary, path).map_err(|e| Error::io(path, e))
}
