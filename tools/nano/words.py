"""Words that the templates are filled with."""


def _split(text):
    return [part.strip() for part in text.replace("\n", " ").split(",") if part.strip()]


NAMES = _split("""Anna, Ben, Clara, David, Emma, Felix, Grace, Henry, Ivy, Jack, Kate, Leo, Mia, Noah, Olivia, Peter, Rosa,
Sam, Tara, Tom, Lucy, Max, Ella, Oscar, Nina, Paul, Sarah, Tim, Julia, Mark, Lily, Adam, Maria, James, Sophie, Daniel, Alice,
George, Hannah, Simon, Zoe, Martin, Laura, Robert, Amy, Chris, Diana, Frank, Helen, Ian, Jane, Kevin, Linda, Michael, Nora,
Owen, Rachel, Steve, Victor, Wendy, Carlos, Elena, Omar, Priya, Yuki, Chen, Fatima, Ahmed, Ravi, Lena""")

ANIMALS = _split("""fox, rabbit, bear, mouse, cat, dog, owl, turtle, frog, duck, horse, goat, lion, elephant, monkey, penguin, whale,
dolphin, squirrel, hedgehog, deer, wolf, pig, cow, sheep, bird, crow, bee, butterfly, snail, spider, ant, dragon, puppy, kitten,
parrot, otter, seal, donkey, chicken, goose, swan, bat, lizard, crab, fish, octopus, tiger, giraffe, camel""")

PEOPLE = _split("""girl, boy, baker, teacher, farmer, sailor, doctor, painter, musician, gardener, king, queen, princess, knight, wizard,
pilot, cook, student, fisherman, carpenter, librarian, scientist, robot, astronaut, detective, nurse, shoemaker, tailor, postman,
shepherd, clown, dancer, singer, writer, old man, old woman, young prince, captain, engineer, photographer, grandmother,
grandfather, little sister, big brother, new kid at school, bus driver, firefighter, inventor, toy maker, ghost, giant, witch""")

TRAITS = _split("""brave, shy, kind, clever, lazy, curious, lonely, tiny, old, young, funny, quiet, proud, hungry, sleepy, honest, selfish,
cheerful, grumpy, gentle, careless, patient, nervous, friendly, stubborn, generous, clumsy, wise, forgetful, hopeful, jealous,
playful, tired, sad, happy, greedy, polite, strange, busy, poor, rich, scared, strong, small, big, blue, silver, lost""")

PLACES = _split("""forest, village, city, beach, mountain, island, farm, castle, school, garden, river, lake, desert, library, market,
train station, old house, cave, ship, bakery, hospital, museum, park, valley, harbor, meadow, kitchen, attic, bridge, lighthouse,
small town, zoo, circus, space station, moon, bookshop, workshop, barn, hill, jungle, ocean, tower, playground, snowy field,
hotel, theater, bus, big field, treehouse, windmill""")

OBJECTS = _split("""key, map, book, lamp, coin, ring, hat, boat, kite, clock, letter, box, mirror, bell, stone, shoe, coat, red ball,
umbrella, candle, music box, violin, drum, basket, bag, flower, seed, feather, shell, rope, ladder, hammer, spoon, cup, teapot, cake,
loaf of bread, apple, pie, blanket, doll, toy train, bicycle, radio, camera, painting, picture, statue, crown, sword, magic wand,
golden egg, treasure chest, old photo, notebook, pencil, backpack, telescope, compass, balloon, scarf, glove, sweater, diary,
puzzle, robot, drone, phone, wallet, ticket, suitcase, jar of honey, pot of soup, secret door, necklace, button, whistle""")

FEELINGS = _split("""friendship, courage, honesty, patience, sharing, hope, kindness, trust, fear, loneliness, love, anger, forgiveness, hard work,
curiosity, being different, saying sorry, telling the truth, helping others, losing a friend, making a mistake, growing up,
being brave, teamwork, listening, dreams, family, home, winter, the first day of school, a long journey, learning to swim""")

PLOTS = _split("""finds a OBJECT, loses a OBJECT, wants to learn to dance, gets lost in the PLACE, meets a TRAIT ANIMAL,
wants to fly, is afraid of the dark, helps a TRAIT PERSON, builds a boat, opens a small shop, wins a race, learns to swim,
makes a new friend, breaks a OBJECT, hears a strange noise, has a big secret, travels to the PLACE, bakes a huge cake,
cannot sleep, saves the PLACE, plants a garden, finds a hidden door, receives a letter, misses the train, tells a lie,
shares a meal with a ANIMAL, looks for a lost OBJECT, wants to see the ocean, discovers a new star, plays music in the PLACE,
has a bad day, learns to say sorry, repairs an old OBJECT, goes fishing, spends a night in the PLACE, wakes up as a ANIMAL,
waits for the first snow, runs away from home, wants to become a PERSON, talks to the moon, organizes a party, paints a picture""")

TOPICS = _split("""the sun, the moon, rain, snow, wind, thunder, rainbows, clouds, the ocean, rivers, mountains, volcanoes, earthquakes, deserts,
forests, trees, flowers, grass, seeds, bees, ants, spiders, butterflies, birds, owls, penguins, dogs, cats, horses, cows, chickens,
elephants, lions, whales, dolphins, sharks, frogs, snakes, dinosaurs, bread, milk, cheese, eggs, rice, pasta, soup, pizza, salad,
apples, bananas, oranges, tomatoes, potatoes, carrots, onions, garlic, chocolate, honey, sugar, salt, tea, coffee, water, juice,
breakfast, lunch, dinner, sleep, dreams, exercise, walking, running, swimming, cycling, yoga, football, basketball, tennis, chess,
music, singing, dancing, painting, drawing, photography, reading, writing, poetry, movies, theater, museums, libraries, schools,
teachers, homework, mathematics, science, history, geography, languages, English, money, saving money, banks, taxes, shopping,
markets, jobs, interviews, meetings, emails, letters, phones, computers, the internet, robots, artificial intelligence, software,
programming, video games, television, radio, newspapers, books, cars, buses, trains, airplanes, ships, bicycles, roads, bridges,
traffic lights, cities, villages, farms, gardens, houses, kitchens, windows, doors, lamps, electricity, batteries, magnets, gravity,
light, sound, heat, ice, fire, air, oxygen, carbon dioxide, plastic, paper, glass, wood, metal, gold, iron, cotton, wool, clothes,
shoes, hats, umbrellas, clocks, calendars, time, seasons, spring, summer, autumn, winter, birthdays, holidays, weddings, families,
parents, grandparents, brothers and sisters, friends, neighbors, babies, children, teenagers, pets, doctors, nurses, hospitals,
medicine, vitamins, the heart, the brain, the lungs, bones, muscles, skin, teeth, eyes, ears, blood, colds, headaches, stress,
happiness, anger, fear, sadness, love, trust, honesty, kindness, patience, courage, planets, Mars, stars, the Milky Way, black holes,
satellites, rockets, astronauts, telescopes, microscopes, atoms, molecules, cells, DNA, plants, photosynthesis, evolution, climate,
climate change, recycling, solar power, wind power, oil, maps, compasses, kings and queens, castles, pyramids, ancient Rome,
ancient Egypt, Greece, China, Japan, India, France, Italy, Spain, Germany, England, America, Africa, Australia, Brazil, Canada, Mexico,
London, Paris, New York, Tokyo, elections, laws, police, firefighters, farmers, bakers, cooks, artists, scientists, engineers,
camping, hiking, fishing, gardening, cooking, baking, cleaning, laundry, first aid, traveling, hotels, passports, volunteering,
meditation, habits, goals, teamwork, leadership, public speaking, creativity, memory, studying, time management""")

THINGS = _split("""a lake and a river, a fruit and a vegetable, a city and a village, a moth and a butterfly, weather and climate, tea and
coffee, a cat and a dog, a job and a career, a rabbit and a hare, an alligator and a crocodile, a planet and a star, a bus and a
train, a novel and a short story, butter and margarine, a frog and a toad, sleep and rest, a teacher and a coach, saving and
investing, a hurricane and a tornado, jam and jelly, sugar and honey, a bicycle and a motorcycle, a museum and a gallery, rice and
pasta, hardware and software, a letter and an email, fog and smoke, a sea and an ocean, a mountain and a hill, a doctor and a nurse""")

TASKS = _split("""boil an egg, make tea, bake bread, clean a window, wash a car, plant a tree, write a letter, learn a new language, sleep better,
save money, start a garden, train a dog, care for a cat, cook rice, make a salad, fix a flat tire, tie a tie, fold a shirt, iron a
shirt, make friends, study for a test, read faster, write a poem, draw a face, take good photos, start running, lose weight, eat
healthy, stay calm, prepare for an interview, give a speech, plan a trip, pack a suitcase, find a job, write an email, organize a
desk, clean a kitchen, remove a stain, make pancakes, make soup, make coffee, grow tomatoes, water plants, feed birds, build a
snowman, ride a bicycle, learn to swim, play chess, play the guitar, sing better, remember names, wake up early, drink more water,
stop worrying, help a friend, say sorry, deal with stress, deal with a cold, treat a small cut, stay warm in winter, stay cool in
summer, save energy, reduce waste, recycle paper, use a map, cross a road safely, take a bus, make a budget, choose a book, start a
diary, tell a story, teach a child to read, celebrate a birthday, wrap a gift, make a paper plane, build a shelf, paint a wall,
clean shoes, choose a phone, make a strong password, back up files, write a good title, write a thank you note, be a good
neighbor, be a good listener, set a goal, keep a promise, make a pizza, peel potatoes, cut onions without crying, store bread""")

WHYS = _split("""is the sky blue, do leaves change color, do birds fly south, do we sleep, do we dream, does ice float, do cats purr, do dogs bark,
do bees make honey, is the sea salty, does the moon change shape, do we have seasons, does it rain, do we yawn, do we need water,
is exercise good for us, should we recycle, do people travel, do people like music, do we need friends, is reading important,
is breakfast important, do plants need sunlight, do stars twinkle, does metal rust, do onions make us cry, do we laugh, do we
cry, is honesty important, should we save money, do we brush our teeth, do airplanes fly, do ships float, is snow white, do volcanoes
erupt, do we have leap years, do people keep pets, is sugar bad for teeth, do trees lose their leaves, do we get hungry, do we
need vitamins, do fish live in water, do spiders make webs, do we have fingerprints, is it dark at night, are forests important,
do we feel cold, does bread rise, do we have laws, do children play, do people drink coffee, is sleep important, is the desert dry""")

LISTS = _split("""animals that live in the sea, fruits that are red, things to do on a rainy day, ways to relax, ideas for dinner, healthy snacks,
good habits, gifts for a friend, things to pack for a trip, ways to save money, games for children, books for children, jobs that
help people, ways to stay healthy, things you find in a kitchen, tools in a workshop, musical instruments, sports you can play
alone, vegetables for a soup, flowers for a garden, reasons to read books, reasons to exercise, tips for better sleep, tips for
students, questions to ask in an interview, names for a cat, names for a dog, names for a small boat, rules for a classroom,
ways to say thank you, animals on a farm, things that fly, things that are round, hobbies for the winter, hobbies for the summer,
ways to help the environment, ways to learn faster, tips for a job interview, ingredients for a cake, birthday party ideas,
ways to make someone smile, things to see in a big city, things to do at the beach, countries in Europe, planets in the solar system""")

WRITES = _split("""a short email to NAME about a meeting on DAY, a thank you note to NAME for the OBJECT, a birthday message for NAME,
a short poem about TOPIC, a poem about a ANIMAL, two sentences about TOPIC, a short paragraph about TOPIC, a slogan for a shop
that sells TOPIC, a short speech about FEELING, an invitation to a party at the PLACE, a short letter from a ANIMAL to a PERSON,
a description of a PLACE, a description of a TRAIT PERSON, a funny sentence about a ANIMAL, a diary entry of a PERSON,
a short dialogue between a PERSON and a ANIMAL, a message to NAME to say that you will be late, an apology to NAME,
a note for NAME about the OBJECT, a riddle about TOPIC, a weather report for a day in the PLACE, a lullaby about a ANIMAL,
an advertisement for a OBJECT, a short review of a book about TOPIC, a short news story about a ANIMAL in a PLACE,
a recipe for a simple soup, a plan for a day at the PLACE, a joke about TOPIC, a paragraph about why FEELING matters""")

DAYS = _split("Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday")

CITIES = _split("""London, Paris, Berlin, Rome, Madrid, Vienna, Oslo, Tokyo, Delhi, Cairo, Sydney, Toronto, Boston, Chicago, Denver, Lima,
Dublin, Lisbon, Athens, Prague, Warsaw, Zurich, Seoul, Bangkok, Nairobi, Seattle, Austin, Miami, Moscow, Istanbul""")

ROOMS = _split("kitchen, bedroom, bathroom, living room, garage, office, hallway, garden, workshop, dining room, basement, laundry room")
COLORS = _split("red, blue, green, yellow, white, black, orange, purple, brown, grey")
GRASPABLE = _split("""cup, ball, box, book, bottle, plate, bowl, spoon, towel, toy car, pen, hammer, screwdriver, apple, banana, can, bag, shoe,
phone, remote control, key, sponge, cube, jar, hat, basket, lamp, pillow, wrench, tray""")
SURFACES = _split("table, shelf, chair, floor, desk, counter, sofa, bed, bench, cabinet, window sill, cart")
