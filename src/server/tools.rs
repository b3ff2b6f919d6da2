//! `tools` and `tool_choice` as asked.

use serde_json::{Map, Value, json};

use super::error::{ApiError, clip};
use super::fields::{Fields, typed};

/// Most tools of one request.
const MAX_TOOLS: usize = 128;
/// Longest name of a function, as OpenAI has it.
const MAX_NAME_BYTES: usize = 64;

/// The functions a model may call.
#[derive(Debug, Clone, PartialEq)]
pub struct Tools {
    /// At least one; names differ.
    pub list: Vec<Function>,
}

/// One function.
#[derive(Debug, Clone, PartialEq)]
pub struct Function {
    /// Letters, digits, `_`, `-` and `.`.
    pub name: String,
    /// JSON schema of its arguments, an object's.
    pub parameters: Value,
    /// The tool as it was sent: templates show it to the model.
    sent: Value,
}

impl Tools {
    /// As a template's variable `tools`.
    pub fn for_template(&self) -> Vec<Value> {
        self.list.iter().map(|function| function.sent.clone()).collect()
    }

    /// The function with this name.
    pub fn find(&self, name: &str) -> Option<&Function> {
        self.list.iter().find(|function| function.name == name)
    }
}

/// Whether the answer calls tools.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ToolChoice {
    /// It is text.
    None,
    /// The model decides.
    Auto,
    /// At least one call, of any tool.
    Required,
    /// One call of this tool.
    Named(String),
}

/// Takes `tools` off a request; `None` where absent.
pub fn definitions(fields: &mut Fields<'_>) -> Result<Option<Tools>, ApiError> {
    let Some(list) = fields.list("tools", "a list of tools", MAX_TOOLS)? else { return Ok(None) };
    if list.is_empty() {
        return Err(ApiError::bad_param("tools", "`tools` must hold at least one tool, got 0."));
    }
    let mut tools = Tools { list: Vec::with_capacity(list.len()) };
    for (at, raw) in list.iter().enumerate() {
        let path = format!("tools[{at}]");
        let function = function(&path, raw.get())?;
        if tools.find(&function.name).is_some() {
            let message =
                format!("`{path}.function.name` is {:?}, which another tool has already.", function.name);
            return Err(ApiError::bad_param(format!("{path}.function.name"), message));
        }
        tools.list.push(function);
    }
    Ok(Some(tools))
}

fn function(path: &str, raw: &str) -> Result<Function, ApiError> {
    let mut tool = Fields::nested(path, raw)?;
    let kind: String = tool.take("type", "function")?.unwrap_or_default();
    if kind != "function" {
        return Err(tool.refused("type", "function", format_args!("{:?}", clip(&kind))));
    }
    let Some(mut function) = tool.object("function")? else {
        let path = tool.path("function");
        return Err(ApiError::bad_param(
            path.clone(),
            format!("`{path}` is required: an object with a name."),
        ));
    };
    tool.finish(&[])?;
    let name: String = function.take("name", "a string")?.unwrap_or_default();
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_-.".contains(&byte);
    if name.is_empty() || name.len() > MAX_NAME_BYTES || !name.bytes().all(plain) {
        let expected = format!("1 to {MAX_NAME_BYTES} letters, digits, `_`, `-` or `.`");
        return Err(function.refused("name", &expected, format_args!("{:?}", clip(&name))));
    }
    let description: Option<String> = function.take("description", "a string")?;
    let parameters: Option<Map<String, Value>> = function.take("parameters", "a JSON schema")?;
    // Whatever is constrained is constrained strictly here; false asks for nothing.
    let strict = function.boolean("strict")?;
    function.finish(&[])?;
    // Rebuilt in the order that templates and models are used to.
    let mut shown = Map::new();
    shown.insert("name".into(), json!(name));
    shown.extend(description.map(|text| ("description".to_owned(), json!(text))));
    shown.extend(parameters.clone().map(|schema| ("parameters".to_owned(), Value::Object(schema))));
    shown.extend(strict.map(|strict| ("strict".to_owned(), json!(strict))));
    let parameters = parameters.filter(|schema| !schema.is_empty()).map_or_else(
        || json!({"type": "object", "properties": {}, "additionalProperties": false}),
        Value::Object,
    );
    Ok(Function { name, parameters, sent: json!({"type": "function", "function": shown}) })
}

/// Takes `tool_choice` off a request.
pub fn choice(fields: &mut Fields<'_>, tools: Option<&Tools>) -> Result<ToolChoice, ApiError> {
    const EXPECTED: &str = "none, auto, required or {\"type\": \"function\", \"function\": {\"name\": ...}}";
    let choice = match fields.raw("tool_choice") {
        None if tools.is_some() => ToolChoice::Auto,
        None => ToolChoice::None,
        Some(raw) if raw.starts_with('{') => {
            let mut named = Fields::nested("tool_choice", raw)?;
            let kind: Option<String> = named.take("type", "function")?;
            let name: Option<String> = match named.object("function")? {
                Some(mut function) => {
                    let name = function.take("name", "a string")?;
                    function.finish(&[])?;
                    name
                }
                None => None,
            };
            named.finish(&[])?;
            match (kind.as_deref(), name) {
                (Some("function"), Some(name)) => ToolChoice::Named(name),
                _ => {
                    return Err(ApiError::bad_param(
                        "tool_choice",
                        format!("`tool_choice` must be {EXPECTED}."),
                    ));
                }
            }
        }
        Some(raw) => match typed::<String>("tool_choice", raw, EXPECTED)?.as_str() {
            "none" => ToolChoice::None,
            "auto" => ToolChoice::Auto,
            "required" => ToolChoice::Required,
            other => return Err(fields.refused("tool_choice", EXPECTED, format_args!("{:?}", clip(other)))),
        },
    };
    match (&choice, tools) {
        (ToolChoice::None, _) => {}
        (_, None) => {
            return Err(ApiError::bad_param("tool_choice", "`tool_choice` is only allowed with `tools`."));
        }
        (ToolChoice::Named(name), Some(tools)) if tools.find(name).is_none() => {
            let message = format!("`tool_choice` names {:?}, which is not among `tools`.", clip(name));
            return Err(ApiError::bad_param("tool_choice", message));
        }
        _ => {}
    }
    Ok(choice)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(request: Value) -> Result<(Option<Tools>, ToolChoice), ApiError> {
        let body = request.to_string();
        let mut fields = Fields::parse(body.as_bytes()).unwrap();
        let tools = definitions(&mut fields)?;
        let choice = choice(&mut fields, tools.as_ref())?;
        Ok((tools, choice))
    }

    fn tool(name: &str) -> Value {
        json!({"type": "function", "function": {"name": name, "parameters": {"type": "object"}}})
    }

    #[test]
    fn choices() {
        let named = json!({"type": "function", "function": {"name": "b"}});
        for (choice, expected) in [
            (json!(null), ToolChoice::Auto),
            (json!("auto"), ToolChoice::Auto),
            (json!("none"), ToolChoice::None),
            (json!("required"), ToolChoice::Required),
            (named, ToolChoice::Named("b".into())),
        ] {
            let (tools, got) =
                parse(json!({"tools": [tool("a"), tool("b")], "tool_choice": choice})).unwrap();
            assert_eq!(got, expected);
            assert_eq!(tools.unwrap().for_template(), [tool("a"), tool("b")]);
        }
        assert_eq!(parse(json!({})).unwrap(), (None, ToolChoice::None));
        assert_eq!(parse(json!({"tool_choice": "none"})).unwrap(), (None, ToolChoice::None));
    }

    #[test]
    fn a_refusal_names_the_tool_and_its_field() {
        for (request, param) in [
            (json!({"tools": []}), "tools"),
            (json!({"tools": {}}), "tools"),
            (json!({"tools": [3]}), "tools[0]"),
            (json!({"tools": [tool("a"), {"function": {"name": "x"}}]}), "tools[1].type"),
            (json!({"tools": [{"type": "retrieval"}]}), "tools[0].type"),
            (json!({"tools": [{"type": "function"}]}), "tools[0].function"),
            (json!({"tools": [tool("two words")]}), "tools[0].function.name"),
            (json!({"tools": [tool("")]}), "tools[0].function.name"),
            (json!({"tools": [tool("a"), tool("a")]}), "tools[1].function.name"),
            (
                json!({"tools": [{"type": "function", "function": {"name": "a", "parameters": 1}}]}),
                "tools[0].function.parameters",
            ),
            (
                json!({"tools": [{"type": "function", "function": {"name": "a", "what": 1}}]}),
                "tools[0].function.what",
            ),
            (json!({"tool_choice": "auto"}), "tool_choice"),
            (json!({"tools": [tool("a")], "tool_choice": "maybe"}), "tool_choice"),
            (json!({"tools": [tool("a")], "tool_choice": {"type": "function"}}), "tool_choice"),
            (
                json!({"tools": [tool("a")], "tool_choice": {"type": "function", "function": {"name": "b"}}}),
                "tool_choice",
            ),
        ] {
            let error = parse(request.clone()).expect_err(&request.to_string());
            assert_eq!(error.param.as_deref(), Some(param), "{request}: {}", error.message);
        }
    }
}
