//! Chat templates against Jinja2 as transformers sets it up (scripts/golden_tokenizer.py).

mod support;

use std::time::{Duration, UNIX_EPOCH};

use ampoule_models::chat::{ChatError, ChatTemplate};
use serde_json::{Map, Value, json};

fn render(template: &ChatTemplate, case: &Value) -> Result<String, ChatError> {
    let none = Map::new();
    let extra = case.get("extra").map_or(&none, |extra| extra.as_object().unwrap());
    let prompt = case.get("add_generation_prompt").is_some_and(|prompt| prompt == true);
    template.render(&case["messages"], case.get("tools"), prompt, extra)
}

#[test]
fn a_tool_calling_template_renders_as_in_the_reference() {
    let source =
        std::fs::read_to_string(support::root().join("conformance/golden/tokenizer/tools.jinja"))
            .unwrap();
    let template = ChatTemplate::new(&source).unwrap();
    let golden = support::golden("chat.json");
    let (mut rendered, mut refused) = (0, 0);
    for case in golden["tools_template"].as_array().unwrap() {
        match (render(&template, case), case["expected"]["text"].as_str()) {
            (Ok(text), Some(expected)) => {
                assert_eq!(text, expected, "{}", case["messages"]);
                rendered += 1;
            }
            (Err(ChatError::Refused(message)), None) => {
                assert_eq!(case["expected"]["kind"], "TemplateError");
                assert_eq!(message, case["expected"]["error"].as_str().unwrap());
                refused += 1;
            }
            (other, _) => {
                panic!("{other:?} for {}, expected {}", case["messages"], case["expected"])
            }
        }
    }
    assert!(rendered >= 14 && refused >= 5, "{rendered} rendered, {refused} refused");
}

#[test]
fn habits_of_jinja_on_python_are_kept() {
    let golden = support::golden("chat.json");
    let case = json!({"messages": [{"role": "user", "content": "Hi there"}]});
    let mut wrong = Vec::new();
    for snippet in golden["snippets"].as_array().unwrap() {
        let name = snippet["name"].as_str().unwrap();
        let result = ChatTemplate::new(snippet["template"].as_str().unwrap())
            .and_then(|template| render(&template, &case));
        match (&result, snippet["expected"]["text"].as_str()) {
            (Ok(text), Some(expected)) if text == expected => {}
            (Err(ChatError::Render(_)), None) => {}
            (_, expected) => wrong.push(format!("{name}:\n  {result:?}\n  {expected:?}")),
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn errors_name_the_cause() {
    let syntax = ChatTemplate::new("a\n{% if %}").unwrap_err();
    assert!(matches!(&syntax, ChatError::Syntax(text) if text.contains("line 2")), "{syntax}");
    let template = ChatTemplate::new("{{ messages[0].content.nope() }}").unwrap();
    let error = template.render(&json!([{"content": "x"}]), None, false, &Map::new()).unwrap_err();
    assert!(matches!(&error, ChatError::Render(text) if text.contains("nope")), "{error}");
}

#[test]
fn the_clock_can_be_set() {
    let day = || UNIX_EPOCH + Duration::from_secs(1_709_251_198);
    let template =
        ChatTemplate::with_clock("Today Date: {{ strftime_now('%d %b %Y') }}", day).unwrap();
    let text = template.render(&json!([]), None, false, &Map::new()).unwrap();
    assert_eq!(text, "Today Date: 29 Feb 2024");
    let template = ChatTemplate::new("{{ strftime_now('%Y') }}").unwrap();
    assert!(template.render(&json!([]), None, false, &Map::new()).unwrap().as_str() > "2025");
}

#[test]
fn variables_of_the_call_go_before_those_of_the_template() {
    let variables = |text: &str| -> Map<String, Value> { serde_json::from_str(text).unwrap() };
    let template = ChatTemplate::new("{{ a }}{{ b }}{{ tools }}{{ documents }}").unwrap();
    let template = template.with_variables(variables(r#"{"a": "1", "b": "2", "messages": 5}"#));
    let text =
        template.render(&json!([]), None, false, &variables(r#"{"b": "3", "tools": 7}"#)).unwrap();
    assert_eq!(text, "13NoneNone");
}

#[test]
fn deep_values_are_refused_or_printed_without_panic() {
    let mut deep = json!(1);
    for _ in 0..2_000 {
        deep = json!([deep]);
    }
    let messages = json!([{"content": deep}]);
    let template = ChatTemplate::new("{{ messages[0].content | tojson }}").unwrap();
    assert!(template.render(&messages, None, false, &Map::new()).is_err());
    let template = ChatTemplate::new("{{ messages[0].content }}").unwrap();
    let _ = template.render(&messages, None, false, &Map::new());
}
