//! Varied text of our own, for checks and measurements: wrong state can pass a test on one repeated token.

use ampoule_engine::EngineError;
use ampoule_models::tokenizer::EncodeOptions;

use crate::{Ampoule, Error};

/// Passages of several kinds: prose, dialogue, code, data, lists, other scripts.
pub const TEXTS: [&str; 10] = [
    "The lighthouse keeper counted the ships twice every evening, once for the log and once for himself. On the \
     ninth of March the two numbers differed. He climbed the stairs again, all one hundred and forty of them, and \
     found a small grey boat tied where no boat could be tied, its lantern lit, its deck swept clean, and nobody \
     aboard. By morning it was gone, and so was the page he had written about it.",
    "fn merge(left: &[u32], right: &[u32]) -> Vec<u32> {\n    let (mut i, mut j) = (0, 0);\n    let mut out = \
     Vec::with_capacity(left.len() + right.len());\n    while i < left.len() && j < right.len() {\n        if left[i] \
     <= right[j] {\n            out.push(left[i]);\n            i += 1;\n        } else {\n            \
     out.push(right[j]);\n            j += 1;\n        }\n    }\n    out.extend_from_slice(&left[i..]);\n    \
     out.extend_from_slice(&right[j..]);\n    out\n}\n",
    "\"You said the pump would last ten years,\" Amara said. \"It lasted eleven,\" the engineer answered, wiping his \
     hands. \"You said it would last ten years after the flood.\" He thought about that for a while. \"Then we should \
     look at the valve,\" he said, \"because the pump is the part I was honest about.\"",
    "{\"order\": 48213, \"customer\": {\"name\": \"R. Okafor\", \"city\": \"Lagos\"}, \"items\": [{\"sku\": \
     \"B-7731\", \"qty\": 3, \"price\": 12.50}, {\"sku\": \"K-0042\", \"qty\": 1, \"price\": 249.99}], \"paid\": true, \
     \"notes\": null, \"shipped_at\": \"2024-11-05T08:31:07Z\"}\n",
    "To make the bread, warm 300 g of milk with 40 g of butter until the butter melts. Let it cool. Stir 7 g of dry \
     yeast into the milk, wait ten minutes, then add 500 g of flour, two eggs and a teaspoon of salt. Knead for eight \
     minutes; the dough should pull away from the bowl. Leave it covered for an hour, shape it, wait another half \
     hour, and bake at 190 degrees until the crust sounds hollow.",
    "Le train de nuit partait à vingt-trois heures sept. Der Schaffner zählte die Koffer, während draußen der Regen \
     gegen die Scheiben schlug. 東京駅の時計は静かに零時を指した。Поезд тронулся без гудка. ¿Quién había dejado la \
     carta sobre el asiento? Το γράμμα δεν είχε όνομα. 🚆🌧️ — nobody knew.\n",
    "Observation 17. The robot approached the red cube from the left, stopped at 0.42 m, opened its gripper, and \
     waited. Force on joint 3: 1.8 N. Observation 18. The cube moved 2 cm towards the edge. The policy replanned in 31 \
     ms and chose the right-hand approach instead. Observation 19. Grasp succeeded; lift height 0.15 m; no slip for \
     five seconds. Observation 20. The operator said: put it next to the blue one, please.",
    "Suppose a number n is written on the board. If n is even, halve it; if n is odd, triple it and add one. Starting \
     from 27 the sequence climbs to 9232 before it falls to 1, after 111 steps in all. Nobody has proved that every \
     start falls to 1. What is known: all starts below 2^68 do, and almost all starts come below any function that \
     grows without bound, however slowly.",
    "Dear tenant, thank you for your letter of 3 June. We have asked the plumber to come on Thursday between nine and \
     noon; please make sure that somebody is at home, or leave a key with the caretaker on the ground floor. The \
     heating cannot be repaired before the part arrives, which the supplier promises for the week of the 17th. Until \
     then we will take 15% off the rent. With kind regards, M. Lindqvist",
    "| river | length (km) | countries | flows into |\n|---|---|---|---|\n| Danube | 2850 | 10 | Black Sea |\n| Rhine | \
     1230 | 6 | North Sea |\n| Mekong | 4350 | 6 | South China Sea |\n| Orange | 2200 | 3 | Atlantic |\n\n1. Which of \
     these crosses the most borders?\n2. Which two are closest in length?\n3. How far is 2850 km in miles?\n",
];

/// SplitMix64: small, seeded, good enough to choose tests.
#[derive(Clone, Debug)]
pub(crate) struct Dice(u64);

impl Dice {
    pub(crate) const fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) const fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// From `0..n`.
    pub(crate) fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }
}

/// `len` tokens of varied text, different for every seed; arbitrary tokens where the model has no tokenizer.
///
/// # Errors
/// If the text cannot be tokenized.
pub fn sample_tokens(model: &Ampoule, len: usize, seed: u64) -> Result<Vec<u32>, Error> {
    let vocabulary = model.engine.vocabulary();
    let mut dice = Dice::new(seed);
    let Ok(tokenizer) = model.tokenizer() else {
        return Ok((0..len).map(|_| dice.below(vocabulary) as u32).collect());
    };
    let mut tokens = Vec::with_capacity(len + 256);
    while tokens.len() < len {
        let passage = TEXTS[dice.below(TEXTS.len())];
        // Sentences in another order and with other numbers each time, so that long texts do not repeat.
        let text = format!("[{}] {passage}\n\n", dice.below(100_000));
        tokens.extend(
            tokenizer.encode(&text, EncodeOptions { add_special: false, parse_special: false })?,
        );
    }
    tokens.truncate(len);
    match tokens.iter().find(|&&t| t as usize >= vocabulary) {
        Some(&token) => Err(EngineError::TokenRange { token, vocabulary }.into()),
        None => Ok(tokens),
    }
}
