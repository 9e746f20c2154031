//! Replies that must follow a grammar: JSON of a schema, or calls of tools.

use std::fmt::Write;
use std::sync::Arc;

use ampoule::{TokenKind, Tokenizer};
use llguidance::api::TopLevelGrammar;
use llguidance::{Matcher, ParserFactory};
use serde_json::{Value, json};
use toktrie::{ApproximateTokEnv, SimpleVob, TokEnv, TokRxInfo, TokTrie};

use crate::error::{ApiError, ApiResult};

/// Bytes of a schema at most.
const SCHEMA_LIMIT: usize = 256 << 10;

/// When a grammar begins to hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Trigger {
    /// From the first token on.
    Now,
    /// After this token has been drawn.
    After(u32),
    /// After each time this token is drawn, until the grammar has been met; then the reply is free again.
    EachTime(u32),
}

/// Compiles grammars for one tokenizer.
pub(crate) struct Grammars {
    factory: ParserFactory,
}

impl Grammars {
    pub(crate) fn new(tokenizer: &Tokenizer, vocabulary: usize) -> Option<Self> {
        let end = *tokenizer.eos_ids().first()?;
        let words: Vec<Vec<u8>> = (0..vocabulary as u32)
            .map(|id| {
                let bytes = tokenizer.token_bytes(id).unwrap_or_default();
                match tokenizer.token_kind(id) {
                    // Control tokens are no text: only a grammar that names them takes them.
                    TokenKind::Special => [&[TokTrie::SPECIAL_TOKEN_MARKER], bytes].concat(),
                    _ => bytes.to_vec(),
                }
            })
            .collect();
        let trie = TokTrie::from(&TokRxInfo::new(vocabulary as u32, end), &words);
        let environment: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let mut factory = ParserFactory::new_simple(&environment).ok()?;
        factory.quiet();
        factory.limits_mut().verbose_errors = false;
        Some(Self { factory })
    }

    fn compile(
        &self,
        grammar: TopLevelGrammar,
        param: &str,
        trigger: Trigger,
    ) -> ApiResult<Constraint> {
        let mut matcher = Matcher::new(self.factory.create_parser(grammar));
        if let Some(error) = matcher.get_error() {
            let first = error.lines().next().unwrap_or_default();
            let text = format!("'{param}' cannot be turned into a grammar: {first}");
            return Err(ApiError::param(param, text));
        }
        // The first mask shows what compiling alone does not.
        matcher.compute_mask_or_eos().map_err(|_| {
            ApiError::param(param, format!("'{param}' is too large or too ambiguous a grammar"))
        })?;
        let active = trigger == Trigger::Now;
        Ok(Constraint { fresh: matcher.deep_clone(), matcher, trigger, active })
    }

    /// JSON of a schema, and nothing else.
    pub(crate) fn json(
        &self,
        schema: &Value,
        param: &str,
        trigger: Trigger,
    ) -> ApiResult<Constraint> {
        let grammar = TopLevelGrammar::from_json_schema(styled(schema, param)?);
        self.compile(grammar, param, trigger)
    }

    /// Calls of tools between `<tool_call>` and `</tool_call>`: one, or more where `many`.
    ///
    /// Where `opened` the first opening tag has been drawn already, and it is one call.
    pub(crate) fn calls(
        &self,
        tools: &[(String, Value)],
        many: bool,
        opened: bool,
        trigger: Trigger,
    ) -> ApiResult<Constraint> {
        let mut lark = String::new();
        let names: Vec<String> = (0..tools.len()).map(|i| format!("call{i}")).collect();
        let any = names.join(" | ");
        lark.push_str(match (opened, many) {
            (true, _) => "start: \"\\n\" call \"\\n</tool_call>\"\n",
            (false, false) => "start: \"<tool_call>\\n\" call \"\\n</tool_call>\"\n",
            (false, true) => {
                "start: one (\"\\n\" one)*\none: \"<tool_call>\\n\" call \"\\n</tool_call>\"\n"
            }
        });
        let _ = writeln!(lark, "call: {any}");
        for (name, (tool, schema)) in names.iter().zip(tools) {
            let schema = styled(schema, "tools")?;
            // As a JSON text inside a string of the grammar.
            let head =
                serde_json::to_string(&format!("{{\"name\": {}, \"arguments\": ", json!(tool)))
                    .map_err(|_| ApiError::internal())?;
            let _ = writeln!(lark, "{name}: {head} {name}_arguments \"}}\"");
            let _ = writeln!(lark, "{name}_arguments: %json {schema}");
        }
        self.compile(TopLevelGrammar::from_lark(lark), "tools", trigger)
    }
}

/// A schema with JSON written as Python's `json.dumps` writes it, which is what models have read most.
fn styled(schema: &Value, param: &str) -> ApiResult<Value> {
    let mut schema = match schema {
        Value::Object(_) => schema.clone(),
        Value::Bool(true) => json!({}),
        _ => {
            return Err(ApiError::param(param, format!("'{param}': the schema must be an object")));
        }
    };
    if schema.to_string().len() > SCHEMA_LIMIT {
        return Err(ApiError::param(
            param,
            format!("'{param}': the schema has more than {SCHEMA_LIMIT} bytes"),
        ));
    }
    if let Some(map) = schema.as_object_mut() {
        map.insert(
            "x-guidance".to_owned(),
            json!({ "whitespace_flexible": false, "item_separator": ", ", "key_separator": ": " }),
        );
    }
    Ok(schema)
}

/// A grammar at work on one reply.
pub(crate) struct Constraint {
    fresh: Matcher,
    matcher: Matcher,
    trigger: Trigger,
    active: bool,
}

impl Clone for Constraint {
    /// Independent of what it was made from.
    fn clone(&self) -> Self {
        Self {
            fresh: self.fresh.deep_clone(),
            matcher: self.matcher.deep_clone(),
            trigger: self.trigger,
            active: self.active,
        }
    }
}

impl Constraint {
    /// The tokens allowed next; `None` where all are.
    pub(crate) fn mask(&mut self) -> ApiResult<Option<SimpleVob>> {
        if !self.active {
            return Ok(None);
        }
        let mask = self.matcher.compute_mask_or_eos();
        mask.map(Some).map_err(|error| {
            tracing::warn!(%error, "a grammar failed");
            ApiError::param("response_format", "the grammar became too ambiguous to follow")
        })
    }

    /// Tells of a token drawn.
    pub(crate) fn drawn(&mut self, token: u32, ends: bool) -> ApiResult<()> {
        if self.active {
            if ends && self.matcher.is_stopped() {
                return Ok(());
            }
            if self.matcher.consume_token(token).is_err() && !ends {
                return Err(ApiError::internal());
            }
            if let Trigger::EachTime(_) = self.trigger
                && self.matcher.is_accepting().unwrap_or(true)
            {
                self.active = false;
            }
            return Ok(());
        }
        match self.trigger {
            Trigger::Now => {}
            Trigger::After(trigger) => self.active = token == trigger,
            Trigger::EachTime(trigger) => {
                if token == trigger {
                    self.matcher = self.fresh.deep_clone();
                    self.active = true;
                }
            }
        }
        Ok(())
    }
}
