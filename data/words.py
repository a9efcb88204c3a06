"""Common words of code and English: one token each to nearly any tokenizer, a small one trained on code included."""

WORDS = """
self the if is return in to and for not of be or else raise name as value with that it file from an try except this
are import by line object data string on list we text will other type can module class result path all key set method
which used default code function node use must context no when at pass have bytes should number any while but only
command argument one message print new so first has mode may end given source time lines tuple event instance option
was size called re break then values header files version prefix arguments current names item call error index into
start specified methods using assert exception options directory token read errors its up state socket open case after
continue objects yield loop parent there found returned frame you more than flags last do user server action address
before write dict same base test root match also next returns attribute range results empty does spec output process
get timeout format package headers protocol level out input each two instead already entry don where help warnings
child finally here host they run true master strings request count need stream handle types close thread response add
some order offset handler stack element either support port available tag part passed check main integer width section
just without because sequence length buffer pattern optional single create group target block named callback like
example top log keyword parameter position member tree variable copy global extra find content long parse chunk build
indent over wait work back http local exist link contain old op byte skip sign select under allow
""".split()
