//! Python pickles, read without executing anything: a stack machine that knows how to build numbers, texts, lists,
//! tuples, dictionaries and PyTorch tensors, and refuses every other opcode and every other global by name.
//!
//! Opcodes: Lib/pickletools.py of CPython; tensors: torch/_utils.py `_rebuild_tensor_v2` and the persistent ids of
//! torch/serialization.py.

use std::collections::HashMap;

use super::number::{Element, Layout};

/// Most objects of a pickle.
const MAX_NODES: usize = 1 << 22;
/// Most values on the stack, or in all lists together.
const MAX_VALUES: usize = 1 << 26;

/// A value; objects are indices into [`Pickle`]'s nodes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Value {
    /// `None`
    None,
    /// `True`, `False`
    Bool(bool),
    /// An integer of up to 64 bits.
    Int(i64),
    /// A float.
    Float(f64),
    /// Anything else.
    Object(usize),
}

/// An object.
#[derive(Debug, Clone, PartialEq)]
pub enum Node {
    /// A text.
    Text(String),
    /// A list.
    List(Vec<Value>),
    /// A tuple.
    Tuple(Vec<Value>),
    /// A dictionary, in its order.
    Dict(Vec<(Value, Value)>),
    /// A name that only a few opcodes may use.
    Global(Global),
    /// The bytes of a tensor, by key.
    Storage { element: Element, key: String },
    /// A tensor.
    Tensor(Tensor),
}

/// What a pickle may name.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Global {
    /// `torch._utils._rebuild_tensor_v2`
    RebuildTensor,
    /// `collections.OrderedDict`
    OrderedDict,
    /// `torch.LongStorage` and its like.
    Storage(Element),
}

/// A tensor whose elements lie elsewhere, row-major.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor {
    /// Key of the storage, a file of the archive.
    pub key: String,
    /// What an element is.
    pub layout: Layout,
    /// Elements before its first.
    pub offset: u64,
    /// Lengths of the axes.
    pub shape: Vec<usize>,
}

/// A pickle that was read.
#[derive(Debug)]
pub struct Pickle {
    nodes: Vec<Node>,
    /// What it is.
    pub root: Value,
}

impl Pickle {
    /// Reads a pickle of protocol 2 to 5.
    ///
    /// # Errors
    /// Where and why it is refused.
    pub fn read(bytes: &[u8]) -> Result<Self, String> {
        let mut machine = Machine { bytes, ..Machine::default() };
        loop {
            let at = machine.at;
            match machine.step() {
                Ok(None) => {}
                Ok(Some(root)) => return Ok(Pickle { nodes: machine.nodes, root }),
                Err(why) => return Err(format!("pickle, byte {at}: {why}")),
            }
        }
    }

    /// The object of a value.
    pub fn node(&self, value: Value) -> Option<&Node> {
        match value {
            Value::Object(index) => self.nodes.get(index),
            _ => None,
        }
    }

    /// The value of a dictionary's key.
    pub fn get(&self, dict: Value, key: &str) -> Option<Value> {
        let Some(Node::Dict(entries)) = self.node(dict) else { return None };
        let is_key = |value: &Value| matches!(self.node(*value), Some(Node::Text(text)) if text == key);
        entries.iter().find(|(name, _)| is_key(name)).map(|(_, value)| *value)
    }

    /// The values of a list or tuple.
    pub fn list(&self, value: Value) -> Option<&[Value]> {
        match self.node(value) {
            Some(Node::List(values) | Node::Tuple(values)) => Some(values),
            _ => None,
        }
    }

    /// A tensor.
    pub fn tensor(&self, value: Value) -> Option<&Tensor> {
        match self.node(value) {
            Some(Node::Tensor(tensor)) => Some(tensor),
            _ => None,
        }
    }
}

#[derive(Default)]
struct Machine<'a> {
    bytes: &'a [u8],
    at: usize,
    nodes: Vec<Node>,
    stack: Vec<Value>,
    marks: Vec<usize>,
    memo: HashMap<u32, Value>,
    /// Values in all lists, tuples and dictionaries.
    held: usize,
}

impl Machine<'_> {
    /// One opcode; the root at the last.
    fn step(&mut self) -> Result<Option<Value>, String> {
        let opcode = self.byte()?;
        match opcode {
            0x80 => match self.byte()? {
                2..=5 => {}
                protocol => return Err(format!("protocol {protocol} is unknown, expected 2 to 5")),
            },
            0x95 => drop(self.take(8)?),
            b'.' => return self.pop().map(Some),
            b'(' => self.marks.push(self.stack.len()),
            b'N' => self.push(Value::None)?,
            0x88 => self.push(Value::Bool(true))?,
            0x89 => self.push(Value::Bool(false))?,
            b'K' | b'M' | b'J' | 0x8a | b'G' => self.number(opcode)?,
            b'X' | 0x8c => self.text(opcode)?,
            b']' => self.push_node(Node::List(Vec::new()))?,
            b'}' => self.push_node(Node::Dict(Vec::new()))?,
            b')' => self.push_node(Node::Tuple(Vec::new()))?,
            0x85..=0x87 => {
                let from =
                    self.stack.len().checked_sub(usize::from(opcode - 0x84)).ok_or("the stack is empty")?;
                self.tuple(from)?;
            }
            b't' => {
                let from = self.mark()?;
                self.tuple(from)?;
            }
            b'a' => {
                let from = self.stack.len().checked_sub(1).ok_or("the stack is empty")?;
                self.append(from)?;
            }
            b'e' => {
                let from = self.mark()?;
                self.append(from)?;
            }
            b's' => {
                let from = self.stack.len().checked_sub(2).ok_or("the stack is empty")?;
                self.set_items(from)?;
            }
            b'u' => {
                let from = self.mark()?;
                self.set_items(from)?;
            }
            b'q' | b'r' | 0x94 | b'h' | b'j' => self.memo(opcode)?,
            b'c' | 0x93 => self.global(opcode)?,
            b'Q' => self.storage()?,
            b'R' => self.reduce()?,
            b'0' => drop(self.pop()?),
            _ => return Err(format!("opcode {:?} is not read", char::from(opcode))),
        }
        Ok(None)
    }

    fn take(&mut self, n: usize) -> Result<&[u8], String> {
        let end = self.at.checked_add(n).filter(|end| *end <= self.bytes.len());
        let end = end
            .ok_or_else(|| format!("cut: {n} bytes are due where {} are left", self.bytes.len() - self.at))?;
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }

    fn byte(&mut self) -> Result<u8, String> {
        Ok(self.take(1)?[0])
    }

    fn u32(&mut self) -> Result<u32, String> {
        Ok(u32::from_le_bytes(*self.take(4)?.first_chunk().expect("4 bytes were taken")))
    }

    fn push(&mut self, value: Value) -> Result<(), String> {
        if self.stack.len() + self.held >= MAX_VALUES {
            return Err(format!("more than the limit of {MAX_VALUES} values"));
        }
        self.stack.push(value);
        Ok(())
    }

    fn push_node(&mut self, node: Node) -> Result<(), String> {
        if self.nodes.len() == MAX_NODES {
            return Err(format!("more than the limit of {MAX_NODES} objects"));
        }
        self.nodes.push(node);
        self.push(Value::Object(self.nodes.len() - 1))
    }

    fn pop(&mut self) -> Result<Value, String> {
        // What lies below a mark is not to be taken before the mark is.
        match self.marks.last() {
            Some(mark) if *mark >= self.stack.len() => Err("the stack is empty above its mark".into()),
            _ => self.stack.pop().ok_or_else(|| "the stack is empty".into()),
        }
    }

    fn mark(&mut self) -> Result<usize, String> {
        let mark = self.marks.pop().ok_or("no mark")?;
        Some(mark).filter(|mark| *mark <= self.stack.len()).ok_or_else(|| "the mark is gone".into())
    }

    fn number(&mut self, opcode: u8) -> Result<(), String> {
        let value = match opcode {
            b'K' => Value::Int(i64::from(self.byte()?)),
            b'M' => Value::Int(i64::from(u16::from_le_bytes(*self.take(2)?.first_chunk().expect("2 bytes")))),
            b'J' => Value::Int(i64::from(self.u32()? as i32)),
            b'G' => Value::Float(f64::from_be_bytes(*self.take(8)?.first_chunk().expect("8 bytes"))),
            _ => {
                let n = usize::from(self.byte()?);
                if n > 8 {
                    return Err(format!("an integer of {n} bytes exceeds 64 bits"));
                }
                let bytes = self.take(n)?;
                let negative = bytes.last().is_some_and(|byte| byte & 0x80 != 0);
                let mut word = [if negative { 0xff } else { 0 }; 8];
                word[..n].copy_from_slice(bytes);
                Value::Int(i64::from_le_bytes(word))
            }
        };
        self.push(value)
    }

    fn text(&mut self, opcode: u8) -> Result<(), String> {
        let n = if opcode == b'X' { self.u32()? as usize } else { usize::from(self.byte()?) };
        let text = String::from_utf8(self.take(n)?.to_vec()).map_err(|_| "a text is not UTF-8")?;
        self.push_node(Node::Text(text))
    }

    fn tuple(&mut self, from: usize) -> Result<(), String> {
        let values = self.stack.split_off(from);
        self.held += values.len();
        self.push_node(Node::Tuple(values))
    }

    /// The object that lies below the values at `from`.
    fn below(&mut self, from: usize) -> Result<&mut Node, String> {
        match from.checked_sub(1).and_then(|at| self.stack.get(at)) {
            Some(Value::Object(index)) => Ok(&mut self.nodes[*index]),
            _ => Err("no object to add to".into()),
        }
    }

    fn append(&mut self, from: usize) -> Result<(), String> {
        let values = self.stack.split_off(from);
        self.held += values.len();
        match self.below(from)? {
            Node::List(list) => list.extend(values),
            _ => return Err("what is appended to is no list".into()),
        }
        Ok(())
    }

    fn set_items(&mut self, from: usize) -> Result<(), String> {
        let values = self.stack.split_off(from);
        if !values.len().is_multiple_of(2) {
            return Err("a key without a value".into());
        }
        self.held += values.len();
        match self.below(from)? {
            Node::Dict(dict) => dict.extend(values.chunks_exact(2).map(|pair| (pair[0], pair[1]))),
            _ => return Err("what is set is no dictionary".into()),
        }
        Ok(())
    }

    fn memo(&mut self, opcode: u8) -> Result<(), String> {
        let index = match opcode {
            b'q' | b'h' => u32::from(self.byte()?),
            0x94 => self.memo.len() as u32,
            _ => self.u32()?,
        };
        if matches!(opcode, b'h' | b'j') {
            let value = *self.memo.get(&index).ok_or_else(|| format!("memo {index} is empty"))?;
            return self.push(value);
        }
        let value = *self.stack.last().ok_or("the stack is empty")?;
        self.memo.insert(index, value);
        Ok(())
    }

    fn global(&mut self, opcode: u8) -> Result<(), String> {
        let (module, name) = if opcode == b'c' {
            (self.line()?, self.line()?)
        } else {
            let name = self.pop_text()?;
            (self.pop_text()?, name)
        };
        let global = match (module.as_str(), name.as_str()) {
            ("torch._utils", "_rebuild_tensor_v2") => Global::RebuildTensor,
            ("collections", "OrderedDict") => Global::OrderedDict,
            ("torch", storage) => Global::Storage(storage_element(storage)?),
            _ => return Err(format!("global {module}.{name} is not allowed")),
        };
        self.push_node(Node::Global(global))
    }

    fn line(&mut self) -> Result<String, String> {
        let rest = &self.bytes[self.at..];
        let n = rest.iter().take(256).position(|byte| *byte == b'\n').ok_or("a name without an end")?;
        let line = String::from_utf8_lossy(&rest[..n]).into_owned();
        self.at += n + 1;
        Ok(line)
    }

    fn pop_text(&mut self) -> Result<String, String> {
        match self.pop()? {
            Value::Object(index) if matches!(self.nodes[index], Node::Text(_)) => match &self.nodes[index] {
                Node::Text(text) => Ok(text.clone()),
                _ => unreachable!("just matched"),
            },
            _ => Err("a text is due".into()),
        }
    }

    /// A persistent id: `("storage", type, key, location, elements)`.
    fn storage(&mut self) -> Result<(), String> {
        let id = self.pop()?;
        let nodes = &self.nodes;
        let node = |value: &Value| match value {
            Value::Object(index) => Some(&nodes[*index]),
            _ => None,
        };
        let Some(Node::Tuple(parts)) = node(&id) else { return Err("a persistent id is no tuple".into()) };
        let storage =
            match (parts.first().and_then(node), parts.get(1).and_then(node), parts.get(2).and_then(node)) {
                (
                    Some(Node::Text(kind)),
                    Some(Node::Global(Global::Storage(element))),
                    Some(Node::Text(key)),
                ) if kind == "storage" => Node::Storage { element: *element, key: key.clone() },
                _ => return Err("a persistent id is no storage".into()),
            };
        self.push_node(storage)
    }

    fn reduce(&mut self) -> Result<(), String> {
        let (arguments, callable) = (self.pop()?, self.pop()?);
        let (Value::Object(arguments), Value::Object(callable)) = (arguments, callable) else {
            return Err("what is called is no global".into());
        };
        match (&self.nodes[callable], &self.nodes[arguments]) {
            (Node::Global(Global::OrderedDict), Node::Tuple(none)) if none.is_empty() => {
                self.push_node(Node::Dict(Vec::new()))
            }
            (Node::Global(Global::RebuildTensor), Node::Tuple(arguments)) => {
                let tensor = self.tensor(arguments)?;
                self.push_node(Node::Tensor(tensor))
            }
            _ => Err("only tensors and empty dictionaries are built".into()),
        }
    }

    /// `(storage, offset, size, stride, requires_grad, hooks)`
    fn tensor(&self, arguments: &[Value]) -> Result<Tensor, String> {
        let node = |index: usize| match arguments.get(index) {
            Some(Value::Object(index)) => Some(&self.nodes[*index]),
            _ => None,
        };
        let lengths = |index: usize| -> Result<Vec<usize>, String> {
            let Some(Node::Tuple(values)) = node(index) else {
                return Err("a tensor without its shape".into());
            };
            let length = |value: &Value| match value {
                Value::Int(n) => usize::try_from(*n).map_err(|_| format!("a tensor axis of {n}")),
                _ => Err("a tensor axis that is no integer".to_owned()),
            };
            values.iter().map(length).collect()
        };
        let Some(Node::Storage { element, key }) = node(0) else {
            return Err("a tensor without storage".into());
        };
        let Some(Value::Int(offset)) = arguments.get(1) else { return Err("a tensor without offset".into()) };
        let offset = u64::try_from(*offset).map_err(|_| format!("a tensor at offset {offset}"))?;
        let (shape, strides) = (lengths(2)?, lengths(3)?);
        let mut due = 1usize;
        for (axis, length) in shape.iter().enumerate().rev() {
            if *length > 1 && strides.get(axis) != Some(&due) {
                return Err(format!(
                    "a tensor of shape {shape:?} with strides {strides:?}; only contiguous ones are read"
                ));
            }
            due = due.checked_mul((*length).max(1)).ok_or_else(|| format!("a tensor of shape {shape:?}"))?;
        }
        Ok(Tensor { key: key.clone(), layout: Layout::little(*element), offset, shape })
    }
}

fn storage_element(name: &str) -> Result<Element, String> {
    Ok(match name {
        "ByteStorage" => Element::U8,
        "CharStorage" => Element::I8,
        "ShortStorage" => Element::I16,
        "IntStorage" => Element::I32,
        "LongStorage" => Element::I64,
        "HalfStorage" => Element::F16,
        "BFloat16Storage" => Element::Bf16,
        "FloatStorage" => Element::F32,
        "DoubleStorage" => Element::F64,
        other => return Err(format!("global torch.{other} is not allowed")),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_objects() {
        // {"a": [1, -2, 300, 2.5], "b": (None, True)}, protocol 2, with memos.
        let bytes = b"\x80\x02}q\x00(X\x01\x00\x00\x00aq\x01]q\x02(K\x01J\xfe\xff\xff\xffM\x2c\x01G\x40\x04\0\0\0\0\0\0eX\x01\x00\x00\x00bN\x88\x86u.";
        let pickle = Pickle::read(bytes).unwrap();
        let list = pickle.list(pickle.get(pickle.root, "a").unwrap()).unwrap();
        assert_eq!(list, [Value::Int(1), Value::Int(-2), Value::Int(300), Value::Float(2.5)]);
        assert_eq!(
            pickle.list(pickle.get(pickle.root, "b").unwrap()).unwrap(),
            [Value::None, Value::Bool(true)]
        );
        assert_eq!(pickle.get(pickle.root, "c"), None);
    }

    #[test]
    fn nothing_is_executed() {
        for (bytes, expected) in [
            (&b"\x80\x02cos\nsystem\nX\x02\0\0\0ls\x85R."[..], "byte 2: global os.system is not allowed"),
            (b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93.", "global builtins.eval is not allowed"),
            (b"\x80\x02ctorch\nload\n.", "global torch.load is not allowed"),
            (b"\x80\x02ccollections\nOrderedDict\n)\x81.", "opcode '\\u{81}' is not read"),
            (b"\x80\x02ccollections\nOrderedDict\n)R}b.", "opcode 'b' is not read"),
            (b"\x80\x02i", "opcode 'i'"),
            (b"\x80\x09.", "protocol 9"),
            (b"\x80\x02K\x01K\x02R.", "what is called is no global"),
            (b"\x80\x02(e.", "no object to add to"),
            (b"\x80\x02K\x01(0.", "the stack is empty above its mark"),
            (b"\x80\x02t.", "no mark"),
            (b"\x80\x02}(K\x01u.", "a key without a value"),
            (b"\x80\x02h\x07.", "memo 7 is empty"),
            (b"\x80\x02X\xff\xff\xff\xffab", "cut: 4294967295 bytes are due where 2 are left"),
            (b"\x80\x02.", "the stack is empty"),
            (b"", "cut: 1 bytes"),
        ] {
            let message = Pickle::read(bytes).unwrap_err();
            assert!(message.contains(expected), "{message:?} should contain {expected:?}");
        }
    }
}
