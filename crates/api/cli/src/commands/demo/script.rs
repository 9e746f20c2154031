//! What the tour reads and asks: an afternoon with a household robot. Where things are follows from what was said, so
//! a reader can tell a right answer from a wrong one.

use ampoule::{Ampoule, EncodeOptions, sample_tokens};
use anyhow::ensure;

use crate::conversation::Conversation;

/// A prefix that several questions share.
pub(super) struct Script {
    pub(super) prefix: Vec<u32>,
    /// Two questions about the prefix, and one whose answer is open.
    pub(super) questions: [Vec<u32>; 3],
    /// How many messages the prefix has; 0 where the model has no chat template and reads arbitrary tokens.
    pub(super) messages: usize,
}

/// The questions as a user types them.
pub(super) const QUESTIONS: [&str; 3] = [
    "Where is the green book?",
    "Where is the red cup?",
    "Tell me a short story about the green book.",
];

const SYSTEM: &str =
    "You are a robot in a house. You can move, look, pick up and put down objects.";

/// What was said; a short tour reads the first [`SHORT`].
const TURNS: [(&str, &str); 26] = [
    (
        "The red cup is on the table in the kitchen. The blue ball is on the floor in the garage. The green book is on \
         the shelf in the bedroom. The yellow box is on the desk in the office. You are in the kitchen. Tell me when \
         you are ready.",
        "I am in the kitchen. I am ready.",
    ),
    (
        "Please bring the red cup to the office and put it on the desk.",
        "Here is my plan:\n1. pick up the red cup from the table\n2. go to the office\n3. put the red cup on the \
         desk\nDone. The red cup is on the desk in the office.",
    ),
    ("Where can I find the green book?", "The green book is on the shelf in the bedroom."),
    ("Go to the garage.", "OK. I went to the garage."),
    ("What do you see?", "I see the blue ball on the floor."),
    (
        "Tell me something about rivers.",
        "A river is a large stream of water that flows through the land to a lake or to the sea. Many towns were \
         built beside rivers, because people need water to drink, to wash and to travel.",
    ),
    (
        "My name is Clara and I live in Oslo.",
        "Nice to meet you, Clara! Oslo sounds like a nice place.",
    ),
    (
        "Put the blue ball on the table in the bedroom.",
        "OK. My steps:\n1. pick up the blue ball from the floor\n2. go to the bedroom\n3. put the blue ball on the \
         table\nDone. The blue ball is on the table in the bedroom.",
    ),
    (
        "Tell me a short story about a lighthouse.",
        "Old Marta kept the lighthouse on the north shore. Every evening she climbed one hundred and forty steps, \
         cleaned the glass and lit the lamp. One night in March a thick fog came in from the sea, and the lamp went \
         out. Marta rang the bell by hand until the sun rose. In the morning three small boats lay safe in the \
         harbor, and the fishermen brought her bread, soup and a new rope for the bell.",
    ),
    (
        "Can you take the yellow box to the bedroom, onto the shelf?",
        "I will do this:\n1. go to the office\n2. pick up the yellow box from the desk\n3. go to the bedroom\n4. put \
         the yellow box on the shelf\nDone. The yellow box is on the shelf in the bedroom.",
    ),
    ("Where are you?", "I am in the bedroom."),
    (
        "My cat is called Whiskers, and my lucky number is 42.",
        "Whiskers is a lovely name for a cat. I will remember your number.",
    ),
    (
        "Give me three tips to keep a kitchen clean.",
        "1. Wash the dishes after every meal, so that they do not pile up.\n2. Wipe the table and the stove while they \
         are still warm.\n3. Take the rubbish out in the evening, and sweep the floor once a day.",
    ),
    ("Go to the garage, please.", "I am driving to the garage. Now I am in the garage."),
    ("What do you see?", "I see none of the objects here."),
    (
        "Why does bread rise?",
        "Bread rises because of yeast. Yeast is a tiny living thing that eats the sugar in the dough and gives off \
         gas. The gas makes bubbles, the dough holds them, and in the oven the bubbles grow until the crust is firm.",
    ),
    (
        "Please bring the green book to the kitchen and put it on the table.",
        "OK. My steps:\n1. go to the bedroom\n2. pick up the green book from the shelf\n3. go to the kitchen\n4. put \
         the green book on the table\nDone. The green book is on the table in the kitchen.",
    ),
    ("How many objects are in the kitchen?", "There is one object in the kitchen."),
    (
        "What should I pack for a day at the lake?",
        "Take a towel, a hat and enough water. If you want to swim, bring dry clothes as well. Pack something to eat \
         that does not melt in the sun, such as apples, bread and cheese, and do not forget a book for the quiet \
         hours.",
    ),
    (
        "I work as a teacher. On Monday I have a lesson about the moon.",
        "That sounds like interesting work. The moon goes around the earth once in about a month, and it shows us \
         always the same side. It has no light of its own: what we see is sunlight that its grey dust sends back.",
    ),
    ("Go to the office.", "OK. I went to the office."),
    ("Look around. What is here?", "I see the red cup on the desk."),
    (
        "Write a thank you note to my neighbor Omar, who watered the plants.",
        "Dear Omar,\n\nThank you for watering the plants while I was away. The tomatoes are red, the basil is taller \
         than before, and even the old fern looks happy. Please come for coffee on Sunday; there will be \
         cake.\n\nWith kind regards,\nClara",
    ),
    (
        "Put the red cup on the table in the kitchen.",
        "Here is my plan:\n1. pick up the red cup from the desk\n2. go to the kitchen\n3. put the red cup on the \
         table\nDone. The red cup is on the table in the kitchen.",
    ),
    ("Where is the yellow box?", "The yellow box is on the shelf in the bedroom."),
    (
        "What is the weather like when it is foggy?",
        "Fog is a cloud that lies on the ground. The air is cold and wet, it is hard to see far, and sounds seem \
         closer than they are. Drivers go slowly then, and ships ring their bells.",
    ),
];

/// Turns of a short tour.
const SHORT: usize = 8;

impl Script {
    /// The session as the model's chat template writes it; arbitrary tokens where it has none.
    pub(super) fn new(model: &Ampoule, short: bool) -> anyhow::Result<Self> {
        let most = model.engine.context() / 2;
        if model.template().is_err() {
            let sample = |n, seed| sample_tokens(model, n, seed);
            let prefix = sample((if short { 320 } else { 1400 }).min(most), 1)?;
            let questions = [sample(24, 2)?, sample(24, 3)?, sample(24, 4)?];
            return Ok(Self { prefix, questions, messages: 0 });
        }
        let mut turns = if short { SHORT } else { TURNS.len() };
        loop {
            let script = Self::of(model, &TURNS[..turns])?;
            if script.prefix.len() <= most || turns == 1 {
                return Ok(script);
            }
            turns -= 1;
        }
    }

    fn of(model: &Ampoule, turns: &[(&str, &str)]) -> anyhow::Result<Self> {
        let tokenizer = model.tokenizer()?;
        let encode = |text: &str| tokenizer.encode(text, EncodeOptions::TEMPLATE);
        let mut session = Conversation::default();
        session.push("system", SYSTEM);
        for (user, assistant) in turns {
            session.push("user", user);
            session.push("assistant", assistant);
        }
        let messages = session.messages.len();
        let mut prefix = None;
        let mut questions = Vec::new();
        for question in QUESTIONS {
            let mut asked = session.clone();
            asked.push("user", question);
            let text = asked.prompt(model)?;
            // Up to where the question begins, the text is the same for each.
            let (before, behind) = text.split_at(text.rfind(question).unwrap_or(0));
            let shared = prefix.get_or_insert_with(|| before.to_owned());
            ensure!(
                !before.is_empty() && shared == before,
                "this model's chat template rewrites messages, so the questions share no prefix"
            );
            questions.push(encode(behind)?);
        }
        let questions = questions.try_into().unwrap_or_default();
        Ok(Self { prefix: encode(&prefix.unwrap_or_default())?, questions, messages })
    }
}
