//! A conversation of many turns with a boundary after each: what its capsules cost, and that each of them is exact.

use ampoule_engine::{Capsule, Digest, SlotId};
use ampoule_models::tokenizer::EncodeOptions;
use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::texts::Dice;
use crate::{Ampoule, Error, SamplingParams, TEXTS};

/// What to say, and how long to answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TurnsOptions {
    /// Turns; a boundary is frozen after each.
    pub turns: usize,
    /// Tokens of a reply at most. Replies differ in length: a third of it at least.
    pub reply: usize,
    /// Chooses reply lengths, samples, and the order of restores.
    pub seed: u64,
}

impl Default for TurnsOptions {
    fn default() -> Self {
        Self { turns: 40, reply: 72, seed: 1 }
    }
}

/// One turn, and the capsule at its end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Turn {
    /// Tokens of the user's message, with what the chat template puts around it.
    pub message_tokens: usize,
    /// Tokens of the reply.
    pub reply_tokens: usize,
    /// Tokens read at its end.
    pub position: u32,
    /// Bytes of rows that this capsule alone added.
    pub own_row_bytes: usize,
    /// Bytes of its fixed state.
    pub fixed_bytes: usize,
    /// Bytes of a copy of everything: fixed state and all rows.
    pub full_copy_bytes: usize,
}

/// What the turns cost.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TurnsReport {
    /// One entry per turn.
    pub turns: Vec<Turn>,
    /// Bytes of the rows of the whole conversation, once.
    pub final_row_bytes: usize,
    /// Fixed state of one boundary.
    pub fixed_bytes: usize,
    /// Rows and fixed state of all capsules, as they say.
    pub own_bytes: usize,
    /// What the backend counts for them.
    pub held_bytes: usize,
    /// `final_row_bytes` and one fixed state a turn: nothing can cost less that keeps every boundary.
    pub floor_bytes: usize,
    /// `held_bytes` over `floor_bytes`.
    pub over_floor: f64,
    /// What full copies would take.
    pub full_copy_bytes: usize,
    /// `full_copy_bytes` over `held_bytes`.
    pub copies_over_held: f64,
    /// Capsules restored, in a random order, into another slot.
    pub restored: usize,
    /// Restores after which any State byte, any logit, or the reading of the next message differed.
    pub mismatches: usize,
    /// The first that differed, in words.
    pub first_mismatch: Option<String>,
}

/// What a user says. Greetings, facts, code, lists, other languages, things pasted, changes of mind.
const MESSAGES: [&str; 40] = [
    "Hi! I'm planning a week in Lisbon in March and know nobody there. Where would you start?",
    "How warm does it get?",
    "Two of us, one vegetarian. Write a packing list, at most ten lines.",
    "Please summarise this for me in one sentence:",
    "ok thanks",
    "Different topic. What is wrong with `for (i = 0; i <= n; i++) a[i] = 0;` if a has n elements?",
    "And in Rust?",
    "Can you explain what this function does, step by step, and what happens if both inputs are empty?",
    "No, shorter.",
    "Give me three names for a small bakery run by two former physicists.",
    "The second one. Why that one?",
    "Was bedeutet 'Feierabend', und wie würdest du es auf Englisch sagen?",
    "¿Y en español?",
    "Here is a dialogue from my story. What does the reader learn about the engineer?",
    "Make her sound less angry",
    "Convert 72 °F to Celsius, then 100 km/h to m/s. Show the steps.",
    "Are you sure about the second?",
    "Turn this record into plain English, leaving the customer's name out:",
    "Write a polite reply that says the parcel is late by two days, and offers 10% off the next order.",
    "Too formal.",
    "What did I ask you first, by the way?",
    "If a train leaves at 23:07 and arrives at 06:52 the next day, how long does it take?",
    "List the planets with more than one moon. Then list those with none.",
    "How would you halve this recipe, and can I use oat milk?",
    "My dough did not rise :( it has been 50 minutes, the kitchen has about 17 degrees",
    "Explain recursion to a nine-year-old. Use a queue of people, not mirrors.",
    "and now to a judge",
    "Which languages are in this passage? Name them in order.",
    "SELECT name, COUNT(*) FROM visits GROUP BY name HAVING COUNT(*) > 3 ORDER BY 2 DESC; what does the 2 mean?",
    "I have to choose between a job that pays more and one that is nearer. What should I ask myself?",
    "Here are the robot's notes from today. Did anything go wrong?",
    "What would you check next?",
    "Is it true that all numbers below 2^68 reach 1? What exactly is known? This is what I read:",
    "Haiku about that.",
    "Draft an answer to my landlord. I can be at home on Thursday only after eleven.",
    "Add that the heating in the bathroom makes a noise like a kettle, from about 5 to 6 in the morning",
    "Which of these rivers would you drop if the table had to lose one row, and why?",
    "Thanks. One more: what is the difference between latency and throughput, with a lift as the example?",
    "Sum up our conversation in five bullet points.",
    "Great. Good night!",
];

/// Turns whose message ends with a passage of [`TEXTS`], and which one.
const PASTED: [(usize, usize); 10] =
    [(3, 0), (7, 1), (13, 2), (17, 3), (23, 4), (27, 5), (30, 6), (32, 7), (34, 8), (36, 9)];

fn message(turn: usize) -> String {
    let index = turn % MESSAGES.len();
    let pasted = PASTED.iter().find(|(at, _)| *at == index);
    let text = pasted.map_or_else(String::new, |(_, text)| format!("\n\n{}", TEXTS[*text]));
    // The same words twice would be another kind of text.
    let round = turn / MESSAGES.len();
    let again = if round == 0 { String::new() } else { format!("({}) ", round + 1) };
    format!("{again}{}{text}", MESSAGES[index])
}

/// The stand-in for what was said before.
const STAND_IN: &str = "ampoule-stand-in";

/// Tokens that a message adds to the conversation, up to where the reply begins. A model without a tokenizer reads the
/// message's bytes.
fn message_tokens(model: &Ampoule, turn: usize, last: Option<u32>) -> Result<Vec<u32>, Error> {
    let text = message(turn);
    let Ok(tokenizer) = model.tokenizer() else {
        let vocabulary = model.engine.vocabulary() as u32;
        return Ok(text.bytes().map(|b| u32::from(b) % vocabulary).collect());
    };
    let Ok(template) = model.template() else {
        return Ok(tokenizer.encode(&format!("\n{text}\n"), EncodeOptions::PROMPT)?);
    };
    let said = |role: &str, content: &str| json!({ "role": role, "content": content });
    let render = |messages: Vec<Value>, prompt| {
        template.render(&Value::Array(messages), None, prompt, &Map::new())
    };
    let added = if turn == 0 {
        render(vec![said("user", &text)], true)?
    } else {
        let before = vec![said("user", STAND_IN), said("assistant", STAND_IN)];
        let whole = render([before, vec![said("user", &text)]].concat(), true)?;
        // What follows the reply: its end, unless the model has said that itself, and the message.
        let after = whole.rfind(STAND_IN).map_or("", |at| &whole[at + STAND_IN.len()..]);
        let ended = last.filter(|token| model.end_tokens().contains(token));
        let ended = ended.map_or_else(String::new, |token| tokenizer.decode(&[token]));
        after.strip_prefix(ended.as_str()).unwrap_or(after).to_owned()
    };
    Ok(tokenizer.encode(&added, EncodeOptions::TEMPLATE)?)
}

/// What a boundary must be equal to after a restore.
struct Known {
    capsule: Capsule,
    state: Digest,
    logits: Digest,
    /// The message that came next, and the logits after it.
    next: Option<(Vec<u32>, Digest)>,
}

/// Every State byte, buffer by buffer.
fn state(model: &mut Ampoule, slot: SlotId) -> Result<Digest, Error> {
    let mut all = Vec::new();
    for (name, bytes) in model.engine.state_bytes(slot)? {
        all.extend_from_slice(name.as_bytes());
        all.extend_from_slice(Digest::of(&bytes).as_bytes());
    }
    Ok(Digest::of(&all))
}

fn logits(model: &mut Ampoule, slot: SlotId) -> Result<Digest, Error> {
    let logits = model.engine.logits(slot)?;
    let bytes: Vec<u8> = logits.iter().flat_map(|l| l.to_bits().to_le_bytes()).collect();
    Ok(Digest::of(&bytes))
}

/// Talks for so many turns in one slot, freezes each turn's end, and restores all of them into another slot, which then
/// reads the next message. Nothing is held in the engine before and after but the capsules returned, one a turn.
///
/// `progress` is told turns and restores done, and in all. Takes two free slots.
///
/// # Errors
/// If the context is too short for the conversation, the budget for capsules too small, no slot is free, or the device
/// fails.
pub fn turns(
    model: &mut Ampoule,
    options: &TurnsOptions,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<(TurnsReport, Vec<Capsule>), Error> {
    let before = model.engine.capsule_bytes().0;
    let all = 2 * options.turns;
    let mut dice = Dice::new(options.seed);
    let slot = model.engine.create_slot()?;
    let other = model.engine.create_slot()?;
    let sampler =
        SamplingParams { temperature: 0.8, top_p: 0.95, seed: options.seed, ..Default::default() };
    model.engine.configure(slot, &sampler)?;
    let (mut known, mut turns): (Vec<Known>, Vec<Turn>) = (Vec::new(), Vec::new());
    let mut last = None;
    for turn in 0..options.turns {
        let tokens = message_tokens(model, turn, last)?;
        model.append(slot, &tokens)?;
        let heard = logits(model, slot)?;
        if let Some(boundary) = known.last_mut() {
            boundary.next = Some((tokens.clone(), heard));
        }
        model.engine.begin_reply(slot)?;
        let least = options.reply / 3;
        let most = (least + dice.below(options.reply - least + 1)).max(1);
        let mut reply_tokens = 0;
        while reply_tokens < most {
            let token = model.engine.step(slot)?;
            (reply_tokens, last) = (reply_tokens + 1, Some(token));
            if model.end_tokens().contains(&token) {
                break;
            }
        }
        let capsule = model.engine.snapshot(slot)?;
        turns.push(Turn {
            message_tokens: tokens.len(),
            reply_tokens,
            position: capsule.position(),
            own_row_bytes: capsule.own_row_bytes(),
            fixed_bytes: capsule.fixed_bytes(),
            full_copy_bytes: capsule.fixed_bytes() + capsule.row_bytes(),
        });
        let (state, logits) = (state(model, slot)?, logits(model, slot)?);
        known.push(Known { capsule, state, logits, next: None });
        progress(turn + 1, all);
    }
    let held_bytes = model.engine.capsule_bytes().0 - before;
    let mut order: Vec<usize> = (0..known.len()).collect();
    for at in (1..order.len()).rev() {
        order.swap(at, dice.below(at + 1));
    }
    let (mut mismatches, mut first_mismatch) = (0, None);
    for (done, &index) in order.iter().enumerate() {
        let boundary = &known[index];
        model.engine.restore(other, &boundary.capsule)?;
        let mut wrong = Vec::new();
        if state(model, other)? != boundary.state {
            wrong.push("its state");
        }
        if logits(model, other)? != boundary.logits {
            wrong.push("its logits");
        }
        if let Some((tokens, heard)) = &boundary.next {
            model.append(other, tokens)?;
            if logits(model, other)? != *heard {
                wrong.push("the logits after the next message");
            }
        }
        if !wrong.is_empty() {
            mismatches += 1;
            let text = || format!("turn {}: {} differ", index + 1, wrong.join(" and "));
            first_mismatch.get_or_insert_with(text);
        }
        progress(options.turns + done + 1, all);
    }
    model.engine.drop_slot(other)?;
    model.engine.drop_slot(slot)?;
    let last = known.last().map(|k| &k.capsule);
    let final_row_bytes = last.map_or(0, Capsule::row_bytes);
    let fixed_bytes = last.map_or(0, Capsule::fixed_bytes);
    let floor_bytes = final_row_bytes + turns.len() * fixed_bytes;
    let full_copy_bytes = turns.iter().map(|t| t.full_copy_bytes).sum();
    let report = TurnsReport {
        own_bytes: turns.iter().map(|t| t.own_row_bytes + t.fixed_bytes).sum(),
        turns,
        final_row_bytes,
        fixed_bytes,
        held_bytes,
        floor_bytes,
        over_floor: held_bytes as f64 / floor_bytes.max(1) as f64,
        full_copy_bytes,
        copies_over_held: full_copy_bytes as f64 / held_bytes.max(1) as f64,
        restored: order.len(),
        mismatches,
        first_mismatch,
    };
    Ok((report, known.into_iter().map(|k| k.capsule).collect()))
}
